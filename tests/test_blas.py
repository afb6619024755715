"""The choice between CUDA's two libraries for products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import blas
from kernels.blas import choosing_libraries, product

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_chosen", {})


@pytest.mark.parametrize(
    ("default", "other", "expected"),
    [
        # One slow run, the other library's or its own, does not decide.
        ([50.0, 50.0, 90.0], [45.0, 45.0, 45.0], "cublaslt"),
        ([50.0, 50.0, 50.0], [45.0, 45.0, 90.0], "cublaslt"),
        ([50.0, 50.0, 50.0], [60.0, 60.0, 60.0], "cublas"),
        # About as fast.
        ([50.0, 50.0, 50.0], [49.0, 49.0, 49.0], "cublas"),
    ],
)
def test_the_other_library_must_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, default: list[float], other: list[float], expected: str
) -> None:
    def times(*_: torch.Tensor) -> Iterator[list[float]]:
        yield from (default, other)

    monkeypatch.setattr(blas, "_milliseconds", times)
    assert blas._faster(torch.zeros(1, 2), torch.zeros(3, 2)) == expected


def test_a_product_goes_to_where_it_is_told() -> None:
    x, weight, out = torch.randn(3, 5), torch.randn(7, 5), torch.full((3, 7), torch.nan)
    assert product(x, weight, out) is out
    torch.testing.assert_close(out, x @ weight.T)
    torch.testing.assert_close(product(x, weight), out)


@on_gpu
@pytest.mark.parametrize("library", ["cublas", "cublaslt"])
def test_both_libraries_make_the_product(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    x, weight = (torch.randn(n, 320, device="cuda", dtype=torch.bfloat16) for n in (33, 190))
    expected = (x.double() @ weight.double().T).float()
    before = torch.backends.cuda.preferred_blas_library()
    monkeypatch.setattr(blas, "_faster", lambda *_: library)
    with choosing_libraries():
        product(x, weight)
    # bfloat16 keeps 8 bits; sums of 320 products of magnitude 1 are about 18.
    torch.testing.assert_close(product(x, weight).float(), expected, rtol=2**-8, atol=0.1)
    assert set(blas._chosen.values()) == {library}
    assert torch.backends.cuda.preferred_blas_library() == before


@on_gpu
def test_a_shape_is_timed_only_while_libraries_are_chosen() -> None:
    x, weight = (torch.randn(n, 320, device="cuda", dtype=torch.bfloat16) for n in (33, 192))
    product(x, weight)
    assert not blas._chosen
    with choosing_libraries():
        product(x, weight)
        product(x[:7], weight)
    product(x[:9], weight)
    assert {shape.rows for shape in blas._chosen} == {33, 7}
    assert set(blas._chosen.values()) <= {"cublas", "cublaslt"}
