"""Which rows of a batch run on which adapter, for the LoRA operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Rows of one program of the Triton kernels. 32 was the fastest or within 3% of it for every
#: linear group of an 8B model at 256 and at 2,304 rows (docs/gpu.md).
TILE_ROWS = 32


class Segment(NamedTuple):
    """Rows of a batch that share an adapter, and where that adapter's weights stand.

    Rank 0 stands for rows without adapter.
    """

    first_row: int
    end_row: int
    first_rank: int
    rank: int


class LoraTile(NamedTuple):
    """A few rows of one segment: what one program of a Triton kernel works on."""

    first_row: int
    num_rows: int
    first_rank: int
    rank: int


class GainRows(NamedTuple):
    """Rows of a batch whose base product is multiplied before the low-rank one is added.

    gains: [layers, out_features] float32
    """

    first_row: int
    end_row: int
    gains: torch.Tensor


@dataclass(frozen=True)
class LoraRows:
    """The rows of a batch, those of an adapter side by side."""

    segments: Sequence[Segment]
    """Those with an adapter; what the torch twins go by."""
    tiles: torch.Tensor | None
    """On a GPU [tiles, 4] int32, the fields of ``LoraTile``: all rows, those without adapter too.
    Some may be empty, so that a CUDA graph serves every batch of a size."""
    num_ranks: int
    """Ranks up to the last one of the segments' adapters."""
    shrink_tiles: torch.Tensor | None = None
    """On a GPU, where ``lora_shrink`` is to work by segments: its tiles, like ``tiles``."""
    gains: Sequence[GainRows] = ()
    """The rows of adapters with DoRA."""

    def scale(self, y: torch.Tensor, layer: int, bias: torch.Tensor | None = None) -> None:
        """``y[rows] *= gains[layer]``, in float32; other rows keep every bit.

        bias: what of ``y`` is no product, and keeps its length: [features]
        """
        for first_row, end_row, gains in self.gains:
            rows, gain = y[first_row:end_row], gains[layer]
            if bias is None:
                rows.mul_(gain)
            else:
                rows.copy_(torch.lerp(bias.float(), rows.float(), gain))


def lora_tiles(segments: Sequence[Segment], tile_rows: int = TILE_ROWS) -> list[LoraTile]:
    """Segments cut into tiles of at most so many rows."""
    return [
        LoraTile(row, min(tile_rows, end_row - row), first_rank, rank)
        for first_row, end_row, first_rank, rank in segments
        for row in range(first_row, end_row, tile_rows)
    ]
