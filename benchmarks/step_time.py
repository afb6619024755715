"""How long an H100 takes for one batch of Llama-3.1-8B's shape: a model of measured times.

The figures were measured on 2026-11-24, kernel by kernel, in microseconds of one layer where
nothing else is said, and are interpolated between the rows that were measured. `REST` and what the
expand takes in large batches are not measured; they are chosen so that the four workloads of
benchmarks/make_model.py take as long as they did, in the order in which they ran then.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from worker.scheduler import ScheduledSequence

_LAYERS = 32
_ROWS = [1, 64, 256, 512, 2304, 8192]

#: The four products of the base model, without and with the A of 512 ranks under the weights.
_BASE_PRODUCTS = [168, 171, 204, 305, 1390, 5169]
_STACKED_PRODUCTS = [184, 187, 211, 355, 1614, 5900]

#: What adapters add to the products' results.
_EXPAND = [18, 20, 23, 28, 70, 230]

#: Norms, rotary and KV write, activation.
_OTHER_FIXED, _OTHER_PER_ROW = 13, 0.05

#: Decode attention: a launch, and the keys and values of 8 heads of 128 in bf16 at 2.7 TB/s.
_DECODE_FIXED, _DECODE_PER_KEY = 8, 4096 / 2.7e6

#: Prefill attention: products of 32 heads of 128 with keys and with values at 105 TFLOP/s.
_PREFILL_PER_PAIR = 4 * 4096 / 105e6

#: For a whole batch: the head's weights (1.05 GB at 2.7 TB/s), choosing tokens, gaps.
_REST = 1200


def step_seconds(batch: list[ScheduledSequence], *, for_adapters: bool) -> float:
    """Seconds for a batch, whose tokens do not count as cached yet.

    ``for_adapters``: on a worker that was started for adapters, whose A stand under the weights.
    """
    rows = sum(item.num_rows for item in batch)
    layer = np.interp(rows, _ROWS, _STACKED_PRODUCTS if for_adapters else _BASE_PRODUCTS)
    if for_adapters:
        layer += np.interp(rows, _ROWS, _EXPAND)
    layer += _OTHER_FIXED + _OTHER_PER_ROW * rows
    layer += _decode_attention(item for item in batch if not item.is_prefill)
    layer += _prefill_attention(item for item in batch if item.is_prefill)
    return float(_LAYERS * layer + _REST) / 1e6


def _decode_attention(items: Iterable[ScheduledSequence]) -> float:
    keys = sum(item.sequence.num_tokens for item in items)
    return _DECODE_FIXED + _DECODE_PER_KEY * keys if keys else 0.0


def _prefill_attention(items: Iterable[ScheduledSequence]) -> float:
    """A row sees the cached keys and those of the chunk up to its own."""
    pairs = sum(num_rows * (sequence.num_cached + num_rows / 2) for sequence, num_rows, _ in items)
    return _PREFILL_PER_PAIR * pairs
