"""The decoder of all families: one ``forward`` for a batch of any mixture of prefill and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.act_and_mul import act_and_mul, act_and_mul_with_lora
from kernels.lora_embed import lora_embed
from kernels.lora_expand import lora_expand
from kernels.lora_segments import LoraRows
from kernels.paged_attention_decode import paged_attention_decode
from kernels.paged_attention_prefill import PrefillRows, paged_attention_prefill
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary_kv_write import HeadNorms, rotary_kv_write, rotary_kv_write_with_lora
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
        self._scales = config.scales
        self._embedding, self._norm = weights.embedding, weights.norm
        # Rounded, as the families that have it do: for Gemma 55.5 is the root of 3,072 in bfloat16.
        self._embedding_scale = torch.tensor(config.scales.embedding, dtype=weights.dtype).item()
        self._embedding_lora = lora.get((None, "embed_tokens"))
        self._head = LoraLinear(weights.head, lora.get((None, "lm_head")), layer=0)
        self.vocab_size, self.dtype = len(weights.head), weights.head.dtype
        rotaries = list(dict.fromkeys(layer.rotary for layer in config.layers))
        self._rotations = [rotary.tables(context_length, weights.device) for rotary in rotaries]
        self._layers = [
            _Layer(
                index,
                config,
                rotaries.index(config.layers[index].rotary),
                layer,
                kv_cache.layers[index],
                {group: lora.get((index, group)) for group in LINEAR_GROUPS},
            )
            for index, layer in enumerate(weights.layers)
        ]

    @torch.inference_mode()
    def forward(self, batch: DecoderInput, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocabulary], written to ``logits`` if that is given; the keys and
        values go into the cache."""
        residual = self._embed(batch)
        rotations = [(cos[batch.positions], sin[batch.positions]) for cos, sin in self._rotations]
        update = torch.zeros_like(residual)
        for layer in self._layers:
            update = layer.forward(update, residual, rotations, batch)
        update, residual = update[batch.sampled_rows], residual[batch.sampled_rows]
        x = add_rms_norm(update, residual, self._norm, self._eps, self._scales.residual)
        logits = self._head(x, batch.lora.get("lm_head"), out=logits)
        for first_row, end_row, weight in batch.trained.get("lm_head", ()):
            logits[first_row:end_row] = F.linear(x[first_row:end_row], weight)
        if self._scales.logits != 1:
            logits.mul_(self._scales.logits)
        if cap := self._scales.logits_soft_cap:
            logits.div_(cap).tanh_().mul_(cap)
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
        if self._embedding_scale != 1:
            x.mul_(self._embedding_scale)
        return x


class _Layer:
    def __init__(
        self,
        index: int,
        config: ModelConfig,
        rotation: int,
        weights: LayerWeights,
        kv: tuple[torch.Tensor, torch.Tensor],
        lora: Mapping[str, LoraWeights | None],
    ) -> None:
        """``rotation``: which of the decoder's rotations is this layer's."""
        self._eps = config.rms_norm_eps
        self._scales = config.scales
        self._window = config.layers[index].window
        self._rotation = rotation
        self._kv = kv
        self._norms = weights.norms
        self._head_norms: HeadNorms | None = None
        #: Norms of all queries or keys of a row, and the columns in which these stand.
        self._wide_norms: list[tuple[slice, torch.Tensor]] = []
        if "q" in weights.norms:
            q, k = weights.norms["q"], weights.norms["k"]
            if config.family.qk_norms_of == "head":
                self._head_norms = HeadNorms(q, k, self._eps)
            else:
                columns = slice(0, len(q)), slice(len(q), len(q) + len(k))
                self._wide_norms = list(zip(columns, (q, k), strict=True))
        self._qkv, self._o, self._gate_up, self._down = (
            LoraLinear(
                weights.linears[group][: config.out_features(group)],
                lora.get(group),
                index,
                weights.biases.get(group),
            )
            for group in LINEAR_GROUPS
        )
        self._activation = config.activation

    def forward(
        self,
        update: torch.Tensor,
        residual: torch.Tensor,
        rotations: Sequence[tuple[torch.Tensor, torch.Tensor]],
        batch: DecoderInput,
    ) -> torch.Tensor:
        """Adds the update of the layer before to ``residual``, in place; returns its own."""
        lora = batch.lora
        x = self._add(update, residual, "pre_attention")
        q = self._queries(x, lora.get("qkv_proj"), *rotations[self._rotation], batch.cache_rows)
        update = self._o(self._attend(q, batch), lora.get("o_proj"))
        x = self._add(self._normalized(update, "post_attention"), residual, "pre_feedforward")
        update = self._down(self._activate(x, lora.get("gate_up_proj")), lora.get("down_proj"))
        return self._normalized(update, "post_feedforward")

    def _add(self, update: torch.Tensor, residual: torch.Tensor, norm: str) -> torch.Tensor:
        """Add to the residual stream, in place; returns what comes of it, by the norm if the layer
        has that."""
        weight = self._norms.get(norm)
        if weight is not None:
            return add_rms_norm(update, residual, weight, self._eps, self._scales.residual)
        return residual.add_(update, alpha=self._scales.residual)

    def _normalized(self, update: torch.Tensor, norm: str) -> torch.Tensor:
        """In place, if the layer has the norm."""
        weight = self._norms.get(norm)
        return update if weight is None else rms_norm(update, weight, self._eps)

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
        if rows is None or lora is None or self._wide_norms:
            qkv = self._qkv(x, rows)
            for columns, weight in self._wide_norms:
                rms_norm(qkv[:, columns], weight, self._eps)
            return rotary_kv_write(qkv, cos, sin, *self._kv, cache_rows, self._head_norms)
        qkv, h = self._qkv.shrink(x, rows)
        return rotary_kv_write_with_lora(
            *(qkv, h, lora.b, rows, lora.part_sizes, cos, sin),
            *(*self._kv, cache_rows, self._head_norms),
        )

    def _attend(self, q: torch.Tensor, batch: DecoderInput) -> torch.Tensor:
        """[rows, q_heads * head_dim]; the rows of decoding sequences stand before the others."""
        n_decode = len(batch.lengths)
        out = torch.empty_like(q)
        scale, soft_cap = self._scales.attention, self._scales.attention_soft_cap
        if n_decode:
            paged_attention_decode(
                q[:n_decode],
                *self._kv,
                batch.page_table,
                batch.lines,
                batch.lengths,
                batch.max_length,
                out[:n_decode],
                scale,
                self._window,
                soft_cap,
            )
        if batch.prefill:
            paged_attention_prefill(
                *(q, *self._kv, batch.page_table, batch.prefill, out),
                *(scale, self._window, soft_cap),
            )
        return out.flatten(1)

    def _activate(self, x: torch.Tensor, rows: LoraRows | None) -> torch.Tensor:
        lora = self._gate_up.lora
        if rows is None or lora is None:
            return act_and_mul(self._gate_up(x, None), self._activation)
        gate_up, h = self._gate_up.shrink(x, rows)
        return act_and_mul_with_lora(gate_up, h, lora.b, rows, lora.part_sizes, self._activation)
