"""What an adapter has in the device's memory beside its place in the slots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch

from schemas.errors import BadInput
from worker.adapters.peft_targets import Place
from worker.model.config import LINEAR_GROUPS, TARGET_GROUPS, ModelConfig

#: Memory of the device that is left alone, for batches that need more than those before them.
_SPARED_BYTES = 256 << 20


@dataclass(frozen=True)
class DeviceWeights:
    """Stands there from the time the adapter is read until nobody holds the adapter."""

    gains: dict[str, torch.Tensor] = field(default_factory=dict)
    """For each group of modules with DoRA [layers, out_features] float32, by which the product of
    the base weight is multiplied; the output head and the embedding count as one layer."""
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    """Those of ``END_MODULES`` [vocab_size, hidden_size] that the adapter replaces."""

    @property
    def num_bytes(self) -> int:
        tensors = {id(tensor): tensor for tensor in (*self.gains.values(), *self.trained.values())}
        return sum(tensor.nbytes for tensor in tensors.values())


def stack_gains(
    gains: Mapping[Place, torch.Tensor], model: ModelConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """``gains``: of each module with DoRA [out_features]; the others' rows keep their length.

    Raises BadInput if the device's memory is full.
    """
    stacked: dict[str, torch.Tensor] = {}
    for group in TARGET_GROUPS:
        parts = model.parts_of(group)
        places = [place for place in gains if place[1] in parts]
        if not places:
            continue
        num_layers = model.num_layers if group in LINEAR_GROUPS else 1
        shape = (num_layers, model.out_features(group))
        stacked[group] = allocate(shape, torch.float32, device, f"DoRA of {group}").fill_(1)
        for layer, module in places:
            start = sum(model.linear_shape(part)[0] for part in parts[: parts.index(module)])
            gain = gains[layer, module]
            stacked[group][layer or 0, start : start + len(gain)] = gain
    return stacked


def allocate(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str
) -> torch.Tensor:
    """Memory of the device; raises BadInput, with the figure, if it has not so much to spare."""
    free = _free_bytes(device)
    try:
        memory = torch.empty(*shape, dtype=dtype, device=device)
        # Looked at afterwards on a GPU: what torch had in its own cache takes nothing of it.
        left = _free_bytes(device) if device.type == "cuda" else free - memory.nbytes
        if left >= _SPARED_BYTES:
            return memory
    except torch.OutOfMemoryError:
        pass
    megabytes = math.prod(shape) * dtype.itemsize / 1e6
    raise BadInput(
        f"{what} needs {megabytes:,.1f} MB of the device's memory, which has"
        f" {max(0, free - _SPARED_BYTES) / 1e6:,.1f} MB to spare. Unload other adapters, or start"
        " the worker with a lower --mem-fraction-static or --max-loaded-loras."
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
