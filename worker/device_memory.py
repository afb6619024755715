"""How torch takes a GPU's memory, and what shows that memory did not suffice."""

from __future__ import annotations

import os

import torch


def use_expandable_segments() -> None:
    """Take memory that can grow; to be called before anything stands on a GPU.

    Settings that the user gave the allocator stay.

    Batches of many sizes otherwise leave holes that none fits in, and torch takes new memory beside
    them: after four runs of 1,024 jobs on an H100 the worker held 76.8 GB and more each run,
    so 73.6 GB and no more (docs/gpu.md).
    """
    if "PYTORCH_ALLOC_CONF" in os.environ:  # The newer name.
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a computation failed because memory of the device or the host did not suffice."""
    # torch raises a RuntimeError of no class of its own where the host's allocator fails.
    is_of_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_of_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def free_memory() -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
