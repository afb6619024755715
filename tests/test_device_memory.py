"""How torch takes a GPU's memory, and what shows that memory did not suffice."""

from __future__ import annotations

import os

import pytest
import torch

from worker.device_memory import is_out_of_memory, set_up_allocators


def test_the_allocators_are_set_up_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    set_up_allocators()
    assert "expandable_segments:True" in os.environ["PYTORCH_CUDA_ALLOC_CONF"].split(",")

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    set_up_allocators()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


def test_the_newer_name_of_the_setting_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    set_up_allocators()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_only_memory_that_does_not_suffice_counts_as_such() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(host.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.empty(2) @ torch.empty(3)
    assert not is_out_of_memory(other.value)
