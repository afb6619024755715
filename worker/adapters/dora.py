"""DoRA (Liu et al., 2024): the rows of the changed weight get trained lengths."""

from __future__ import annotations

import torch

#: Weights of the rows whose norm is taken at once: 16 MB in float32.
_CHUNK = 1 << 22


def dora_gain(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """``magnitude / ||W + (A^T B)^T||``, row by row: what DoRA multiplies ``x W^T + x A^T B`` by.

    Computed in float32 from the base weight as it is served, as PEFT does.

    weight: [out_features, in_features], of any type, on the device where it is served
    a: [rank, in_features] float32
    b: [rank, out_features] float32, scaled
    magnitude: [out_features] float32
    Returns [out_features] float32 on the weight's device; not finite for a row without length.
    """
    device, (out_features, in_features) = weight.device, weight.shape
    a, b, magnitude = a.to(device), b.to(device), magnitude.to(device)
    num_rows = max(1, _CHUNK // in_features)
    norms = []
    for row in range(0, out_features, num_rows):
        end = row + num_rows
        changed = torch.addmm(weight[row:end].float(), b[:, row:end].t(), a)
        norms.append(torch.linalg.norm(changed, dim=1))
    return magnitude / torch.cat(norms)
