"""Products on a GPU by the library of CUDA's two that is faster for the shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

_DEFAULT, _OTHER = "cublas", "cublaslt"

#: The other library must win by so much: what is about as fast stays as it is, so that workers
#: choose alike and round alike.
_LEAST_GAIN = 0.03

_REPEATS = 7

#: Written before each timed product, so that no weight is left in the GPU's cache (50 MB on an
#: H100).
_FLUSHED_BYTES = 128 << 20


class Shape(NamedTuple):
    """What the choice depends on."""

    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype


_chosen: dict[Shape, str] = {}
_is_choosing = False


@contextmanager
def choosing_libraries() -> Iterator[None]:
    """In here a product of a shape that is new on this GPU is timed by both libraries, and made by
    the faster one from then on; shapes that were never timed go to cuBLAS.

    Each has shapes at which its heuristic picks a slow kernel: the down projection of an 8B model
    takes cuBLAS 56.9 us and cuBLASLt 49.1 at 128 rows of an H100, but 57.3 and 65.6 at 256
    (docs/gpu.md).
    """
    global _is_choosing
    _is_choosing = True
    try:
        yield
    finally:
        _is_choosing = False


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias``. x: [rows, in_features]; weight: [out_features, in_features]; bias:
    [out_features]; returns [rows, out_features], written to ``out`` if given."""
    if x.device.type != "cuda":
        return _multiply(x, weight, out, bias)
    shape = Shape(len(x), *weight.shape, x.dtype)
    if _is_choosing and shape not in _chosen:
        _chosen[shape] = _faster(x, weight)
    return _multiply_by(_chosen.get(shape, _DEFAULT), x, weight, out, bias)


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if bias is not None:
        return torch.addmm(bias, x, weight.t(), out=out)
    if out is None:
        return F.linear(x, weight)
    return torch.mm(x, weight.t(), out=out)


def _multiply_by(
    library: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if library == _DEFAULT:
        return _multiply(x, weight, out, bias)
    torch.backends.cuda.preferred_blas_library(library)
    try:
        return _multiply(x, weight, out, bias)
    finally:
        torch.backends.cuda.preferred_blas_library(_DEFAULT)


def _faster(x: torch.Tensor, weight: torch.Tensor) -> str:
    default, other = (median(times) for times in _milliseconds(x, weight))
    return _OTHER if other < (1 - _LEAST_GAIN) * default else _DEFAULT


def _milliseconds(x: torch.Tensor, weight: torch.Tensor) -> Iterator[list[float]]:
    """Of products by the one library and by the other, in turn."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {_DEFAULT: [], _OTHER: []}
    for _ in range(1 + _REPEATS):
        for library, of_library in events.items():
            flushed.zero_()
            began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            began.record()
            _multiply_by(library, x, weight)
            ended.record()
            of_library.append((began, ended))
    torch.cuda.synchronize()
    for _, *pairs in events.values():  # The first loads the library.
        yield [began.elapsed_time(ended) for began, ended in pairs]
