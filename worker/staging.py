"""Page-locked memory between host and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

#: Batches whose numbers may be on their way at once: one runs, one waits behind it, one is built.
_STAGES = 4


def send(
    numbers: Sequence[float] | Sequence[Sequence[float]] | NDArray[Any],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The numbers on the device, without waiting for what it is at."""
    on_host = torch.tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        on_host = on_host.pin_memory()  # torch.tensor(pin_memory=True) refuses arrays of numpy.
    return on_host.to(device, non_blocking=True)


def bring(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers on the host, once what the device is at is done; returns at once."""
    if numbers.device.type == "cpu":
        return numbers
    on_host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    return on_host.copy_(numbers, non_blocking=True)


class Staging:
    """Memory through which numbers go to the device or come from it while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int32)] * _STAGES
        self._turn = 0

    def take(self, size: int) -> torch.Tensor:
        """[size] int32 on the host; free again ``_STAGES`` calls later."""
        self._turn = (self._turn + 1) % _STAGES
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = torch.empty(
                2 * size, dtype=torch.int32, pin_memory=self._is_cuda
            )
        return self._buffers[self._turn][:size]
