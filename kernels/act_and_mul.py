"""The activation of a gated feed-forward, SwiGLU or GeGLU (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.lora_expand import lora_expand_torch
from kernels.lora_segments import TILE_ROWS, LoraRows

#: ``silu(z) = z / (1 + exp(-z))``; ``gelu_tanh(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715
#: z^3)))``, an approximation of GELU (Hendrycks and Gimpel, 2016).
Activation = Literal["silu", "gelu_tanh"]


def act_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``y = activation(gate) * up``.

    gate_up: [rows, 2 * features], the gate in the first half, rows at any stride.
    Returns [rows, features].
    """
    return (act_and_mul_triton if gate_up.is_cuda else act_and_mul_torch)(gate_up, activation)


def act_and_mul_torch(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)


def act_and_mul_triton(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    n_rows, n_features = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n_rows, n_features)
    if n_rows:
        block = 1024
        _act_and_mul[(n_rows, triton.cdiv(n_features, block))](
            *(gate_up, out, gate_up.stride(0)),
            ACTIVATION=activation,
            FEATURES=n_features,
            BLOCK=block,
            num_warps=4,
        )
    return out


@triton.jit
def _act_and_mul(
    gate_up,
    out,
    stride,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < FEATURES
    gate = tl.load(gate_up + row * stride + columns, mask=mask).to(tl.float32)
    up = tl.load(gate_up + row * stride + FEATURES + columns, mask=mask).to(tl.float32)
    result = _activated(gate, ACTIVATION) * up
    tl.store(out + row * FEATURES + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    exponent = z
    if ACTIVATION == "gelu_tanh":
        # z / 2 * (1 + tanh(u)) is z / (1 + exp(-2 u)); 1.595... is 2 * sqrt(2 / pi).
        exponent = 1.5957691216057308 * (z + 0.044715 * z * z * z)
    return z / (1 + tl.exp(-exponent))


def act_and_mul_with_lora(
    gate_up: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    rows: LoraRows,
    part_sizes: Sequence[int],
    activation: Activation,
) -> torch.Tensor:
    """``act_and_mul`` after ``lora_expand``; on a GPU in one pass over ``gate_up``.

    gate_up: [rows, 2 * features], in an undefined state afterwards
    h, b: as for ``lora_expand`` with ``part_sizes``: two parts, or one where LoRA is of gate and up
        together
    Returns [rows, features].
    """
    if rows.tiles is not None:
        return act_and_mul_with_lora_triton(gate_up, h, b, rows.tiles, len(part_sizes), activation)
    lora_expand_torch(gate_up, h, b, rows.segments, part_sizes)
    return act_and_mul_torch(gate_up, activation)


def act_and_mul_with_lora_triton(
    gate_up: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    tiles: torch.Tensor,
    n_parts: int,
    activation: Activation,
) -> torch.Tensor:
    n_rows, n_features = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n_rows, n_features)
    block_n = 128
    _act_and_mul_with_lora[(triton.cdiv(n_features, block_n), len(tiles))](
        *(gate_up, h, b, tiles, out, gate_up.stride(0), h.stride(0)),
        N_PARTS=n_parts,
        ACTIVATION=activation,
        FEATURES=n_features,
        BLOCK_M=TILE_ROWS,
        BLOCK_N=block_n,
        BLOCK_R=16,
        num_warps=4,
        num_stages=3,
    )
    return out


@triton.jit
def _act_and_mul_with_lora(
    gate_up,
    h,
    b,
    tiles,
    out,
    y_stride,
    h_stride,
    N_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(1)
    first_row = tl.load(tiles + 4 * tile).to(tl.int64)
    n_rows = tl.load(tiles + 4 * tile + 1)
    first_rank = tl.load(tiles + 4 * tile + 2)
    rank = tl.load(tiles + 4 * tile + 3)
    if n_rows == 0:
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    is_row, is_column = m < n_rows, n < FEATURES
    mask = is_row[:, None] & is_column[None, :]
    here = gate_up + (first_row + m)[:, None] * y_stride + n[None, :]
    gate = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(here + FEATURES, mask=mask, other=0.0).to(tl.float32)
    h_rows = h + (first_row + m)[:, None] * h_stride + N_PARTS * first_rank
    for start in range(0, rank, BLOCK_R):
        in_rank = (start + r) < rank
        b_rows = (first_rank + start + r).to(tl.int64)[:, None] * (2 * FEATURES) + n[None, :]
        h_mask, b_mask = is_row[:, None] & in_rank[None, :], in_rank[:, None] & is_column[None, :]
        h_gate = tl.load(h_rows + start + r[None, :], mask=h_mask, other=0)
        b_gate = tl.load(b + b_rows, mask=b_mask, other=0)
        gate = tl.dot(h_gate.to(b_gate.dtype), b_gate, gate, input_precision="ieee")
        h_up = h_gate
        if N_PARTS == 2:
            h_up = tl.load(h_rows + rank + start + r[None, :], mask=h_mask, other=0)
        b_up = tl.load(b + b_rows + FEATURES, mask=b_mask, other=0)
        up = tl.dot(h_up.to(b_up.dtype), b_up, up, input_precision="ieee")
    result = _activated(gate, ACTIVATION) * up
    target = out + (first_row + m)[:, None] * FEATURES + n[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)
