"""Page-locked memory between host and device."""

from __future__ import annotations

import torch

#: Batches whose numbers may be on their way at once: one runs, one waits behind it, one is built.
_STAGES = 4


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
