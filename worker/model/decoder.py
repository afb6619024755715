"""The Llama decoder: one ``forward`` for a batch of any mixture of prefill and decode."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.linear import Linear
from kernels.paged_attention import paged_attention_decode, paged_attention_prefill
from kernels.rms_norm import add_rms_norm
from kernels.rotary_kv_write import rotary_kv_write
from kernels.silu_and_mul import silu_and_mul
from worker.batch import Batch
from worker.kv_cache import KVCache
from worker.model.config import LINEAR_GROUPS, ModelConfig
from worker.model.lora_linear import LoraLinear, LoraWeights
from worker.model.weights import DecoderWeights, LayerWeights


class Decoder:
    """Weights, KV cache and the slots' LoRA weights, put together."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        kv_cache: KVCache,
        lora: list[dict[str, LoraWeights]] | None,
        context_length: int,
    ) -> None:
        """lora: for each layer the weights of each linear group; None for a worker without."""
        self._eps = config.rms_norm_eps
        self._embedding, self._norm = weights.embedding, weights.norm
        self._head = Linear(weights.head)
        self._layers = [
            _Layer(config, layer, kv_cache.layers[index], lora[index] if lora else {})
            for index, layer in enumerate(weights.layers)
        ]
        angles = torch.outer(
            torch.arange(context_length, dtype=torch.float),
            torch.tensor(config.inverse_frequencies),
        ).to(weights.embedding.device)
        self._cos, self._sin = angles.cos(), angles.sin()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [sampled rows, vocabulary] in float32; the keys and values go into the cache."""
        residual = F.embedding(batch.token_ids, self._embedding)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        update = torch.zeros_like(residual)
        for layer in self._layers:
            update = layer.forward(update, residual, cos, sin, batch)
        rows = batch.sampled_rows
        normed = add_rms_norm(update[rows], residual[rows], self._norm, self._eps)
        return self._head(normed).float()


class _Layer:
    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        kv: tuple[torch.Tensor, torch.Tensor],
        lora: dict[str, LoraWeights],
    ) -> None:
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._kv = kv
        self._input_norm = weights.input_norm
        self._post_attention_norm = weights.post_attention_norm
        self._qkv, self._o, self._gate_up, self._down = (
            LoraLinear(weights.linears[group], lora.get(group)) for group in LINEAR_GROUPS
        )

    def forward(
        self,
        update: torch.Tensor,
        residual: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """Adds the update of the layer before to ``residual``, in place; returns its own."""
        loras = batch.lora_segments
        x = add_rms_norm(update, residual, self._input_norm, self._eps)
        q = rotary_kv_write(self._qkv(x, loras["qkv_proj"]), cos, sin, *self._kv, batch.cache_rows)
        attention = self._o(self._attend(q, batch), loras["o_proj"])
        x = add_rms_norm(attention, residual, self._post_attention_norm, self._eps)
        return self._down(silu_and_mul(self._gate_up(x, loras["gate_up_proj"])), loras["down_proj"])

    def _attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[rows, q_heads * head_dim]; the rows of decoding sequences stand before the others."""
        out = torch.empty_like(q)
        if n_decode := batch.num_decode_rows:
            out[:n_decode] = paged_attention_decode(
                q[:n_decode],
                *self._kv,
                batch.page_table,
                batch.lengths,
                batch.length_mask,
                self._scale,
            )
        for chunk in batch.prefill_chunks:
            rows = slice(chunk.first_row, chunk.end_row)
            out[rows] = paged_attention_prefill(
                q[rows], *self._kv, chunk.pages, chunk.length, self._scale
            )
        return out.flatten(1)
