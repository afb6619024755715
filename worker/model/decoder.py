"""The Llama decoder: one ``forward`` for a batch of any mixture of prefill and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.lora_embed import lora_embed
from kernels.lora_expand import lora_expand
from kernels.lora_segments import LoraRows
from kernels.paged_attention_decode import paged_attention_decode
from kernels.paged_attention_prefill import PrefillRows, paged_attention_prefill
from kernels.rms_norm import add_rms_norm
from kernels.rotary_kv_write import rotary_kv_write, rotary_kv_write_with_lora
from kernels.silu_and_mul import silu_and_mul, silu_and_mul_with_lora
from worker.kv_cache import KVCache
from worker.model.config import LINEAR_GROUPS, ModelConfig
from worker.model.lora_linear import LoraLinear, LoraPlace, LoraWeights
from worker.model.weights import DecoderWeights, LayerWeights


class TrainedRows(NamedTuple):
    """Rows of a batch whose adapter replaces a weight, [vocab_size, hidden_size]."""

    first_row: int
    end_row: int
    weight: torch.Tensor


@dataclass(frozen=True)
class DecoderInput:
    """The rows of a batch on the device: those of decoding sequences, then chunks of prompts.

    token_ids, positions, cache_rows: [rows] integers
    lines, lengths: [decode rows] int32, lines of the page table and numbers of keys; 0 keys for a
        row that is none of a decoding sequence
    max_length: at least the largest of ``lengths``
    page_table: [lines, max_pages] int32
    prefill: the chunks; None if there are none
    lora: for each group of modules that an adapter changes, the rows of the adapters; for the
        output head those of ``sampled_rows``
    trained: likewise, for each of ``END_MODULES`` that an adapter replaces
    sampled_rows: [sampled] integers, the rows whose logits are wanted
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cache_rows: torch.Tensor
    lines: torch.Tensor
    lengths: torch.Tensor
    max_length: int
    page_table: torch.Tensor
    prefill: PrefillRows | None
    lora: Mapping[str, LoraRows]
    trained: Mapping[str, Sequence[TrainedRows]]
    sampled_rows: torch.Tensor


class Decoder:
    """Weights, KV cache and the slots' LoRA weights, put together."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        kv_cache: KVCache,
        lora: Mapping[LoraPlace, LoraWeights],
        context_length: int,
    ) -> None:
        """lora: the weights of each group that adapters may change."""
        self.kv_cache = kv_cache
        self._eps = config.rms_norm_eps
        self._embedding, self._norm = weights.embedding, weights.norm
        self._embedding_lora = lora.get((None, "embed_tokens"))
        self._head = LoraLinear(weights.head, lora.get((None, "lm_head")), layer=0)
        self.vocab_size, self.dtype = len(weights.head), weights.head.dtype
        self._layers = [
            _Layer(
                index,
                config,
                layer,
                kv_cache.layers[index],
                {group: lora.get((index, group)) for group in LINEAR_GROUPS},
            )
            for index, layer in enumerate(weights.layers)
        ]
        angles = torch.outer(
            torch.arange(context_length, dtype=torch.float),
            torch.tensor(config.inverse_frequencies),
        ).to(weights.embedding.device)
        self._cos, self._sin = angles.cos(), angles.sin()

    @torch.inference_mode()
    def forward(self, batch: DecoderInput, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocabulary], written to ``logits`` if that is given; the keys and
        values go into the cache."""
        residual = self._embed(batch)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        update = torch.zeros_like(residual)
        for layer in self._layers:
            update = layer.forward(update, residual, cos, sin, batch)
        update, residual = update[batch.sampled_rows], residual[batch.sampled_rows]
        x = add_rms_norm(update, residual, self._norm, self._eps)
        logits = self._head(x, batch.lora.get("lm_head"), out=logits)
        for first_row, end_row, weight in batch.trained.get("lm_head", ()):
            logits[first_row:end_row] = F.linear(x[first_row:end_row], weight)
        return logits

    def _embed(self, batch: DecoderInput) -> torch.Tensor:
        """[rows, hidden_size]"""
        x = F.embedding(batch.token_ids, self._embedding)
        lora, rows = self._embedding_lora, batch.lora.get("embed_tokens")
        if lora and rows:
            rows.scale(x, layer=0)
            h = lora_embed(batch.token_ids, lora.a, rows)
            lora_expand(x, h, lora.b, rows, lora.part_sizes)
        for first_row, end_row, weight in batch.trained.get("embed_tokens", ()):
            x[first_row:end_row] = F.embedding(batch.token_ids[first_row:end_row], weight)
        return x


class _Layer:
    def __init__(
        self,
        index: int,
        config: ModelConfig,
        weights: LayerWeights,
        kv: tuple[torch.Tensor, torch.Tensor],
        lora: Mapping[str, LoraWeights | None],
    ) -> None:
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._kv = kv
        self._input_norm = weights.input_norm
        self._post_attention_norm = weights.post_attention_norm
        self._qkv, self._o, self._gate_up, self._down = (
            LoraLinear(weights.linears[group][: config.out_features(group)], lora.get(group), index)
            for group in LINEAR_GROUPS
        )

    def forward(
        self,
        update: torch.Tensor,
        residual: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: DecoderInput,
    ) -> torch.Tensor:
        """Adds the update of the layer before to ``residual``, in place; returns its own."""
        lora = batch.lora
        x = add_rms_norm(update, residual, self._input_norm, self._eps)
        q = self._queries(x, lora.get("qkv_proj"), cos, sin, batch.cache_rows)
        attention = self._o(self._attend(q, batch), lora.get("o_proj"))
        x = add_rms_norm(attention, residual, self._post_attention_norm, self._eps)
        return self._down(self._activate(x, lora.get("gate_up_proj")), lora.get("down_proj"))

    def _queries(
        self,
        x: torch.Tensor,
        rows: LoraRows | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache_rows: torch.Tensor,
    ) -> torch.Tensor:
        """[rows, q_heads, head_dim]; the keys and values go into the cache."""
        lora = self._qkv.lora
        if rows is None or lora is None:
            return rotary_kv_write(self._qkv(x, None), cos, sin, *self._kv, cache_rows)
        qkv, h = self._qkv.shrink(x, rows)
        return rotary_kv_write_with_lora(qkv, h, lora.b, rows, cos, sin, *self._kv, cache_rows)

    def _attend(self, q: torch.Tensor, batch: DecoderInput) -> torch.Tensor:
        """[rows, q_heads * head_dim]; the rows of decoding sequences stand before the others."""
        n_decode = len(batch.lengths)
        out = torch.empty_like(q)
        if n_decode:
            paged_attention_decode(
                q[:n_decode],
                *self._kv,
                batch.page_table,
                batch.lines,
                batch.lengths,
                batch.max_length,
                out[:n_decode],
                self._scale,
            )
        if batch.prefill:
            paged_attention_prefill(q, *self._kv, batch.page_table, batch.prefill, out, self._scale)
        return out.flatten(1)

    def _activate(self, x: torch.Tensor, rows: LoraRows | None) -> torch.Tensor:
        lora = self._gate_up.lora
        if rows is None or lora is None:
            return silu_and_mul(self._gate_up(x, None))
        gate_up, h = self._gate_up.shrink(x, rows)
        return silu_and_mul_with_lora(gate_up, h, lora.b, rows)
