"""What an adapter has in the device's memory beside its place in the slots."""

from __future__ import annotations

from collections.abc import Mapping
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
        return sum(tensor.nbytes for tensor in (*self.gains.values(), *self.trained.values()))


def stack_gains(
    gains: Mapping[Place, torch.Tensor], model: ModelConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """``gains``: of each module with DoRA [out_features]; the others' rows keep their length.

    Raises BadInput if the device's memory is full.
    """
    stacked: dict[str, torch.Tensor] = {}
    for group, parts in TARGET_GROUPS.items():
        places = [place for place in gains if place[1] in parts]
        if not places:
            continue
        num_layers = model.num_layers if group in LINEAR_GROUPS else 1
        shape = (num_layers, model.out_features(group))
        check_room(device, 4 * shape[0] * shape[1], "the magnitudes of its DoRA")
        stacked[group] = torch.ones(shape, device=device)
        for layer, module in places:
            start = sum(model.linear_shape(part)[0] for part in parts[: parts.index(module)])
            gain = gains[layer, module]
            stacked[group][layer or 0, start : start + len(gain)] = gain
    return stacked


def check_room(device: torch.device, num_bytes: int, what: str) -> None:
    """Raises BadInput if the device has not so much memory to spare."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    spare = max(0, free - _SPARED_BYTES)
    if num_bytes > spare:
        raise BadInput(
            f"{what} take {num_bytes / 1e6:,.1f} MB of the device's memory, which has"
            f" {spare / 1e6:,.1f} MB to spare. Unload other adapters, or start the worker with a"
            " lower --mem-fraction-static or --max-loaded-loras."
        )
