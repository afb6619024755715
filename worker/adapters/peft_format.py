"""A PEFT adapter folder, read, checked against the model, and made ready for a slot.

What cannot be served exactly is refused by name: a wrong answer is worse than none.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from schemas.errors import BadInput
from worker.adapters.device_weights import DeviceWeights, stack_gains
from worker.adapters.peft_config import CONFIG_FILE, read_config, read_settings
from worker.adapters.peft_targets import Place, select
from worker.adapters.peft_tensors import check_base_copies, check_tied, read_factors, read_trained
from worker.adapters.peft_weights import (
    LoraFactors,
    StoredWeights,
    find_weights,
    weights_file,
)
from worker.model.config import TARGET_GROUPS, ModelConfig, group_of
from worker.model.weights import DecoderWeights


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory. Equal only to itself: a name may be loaded anew."""

    name: str
    source: str
    revision: str
    rank: int
    """The largest of its modules' ranks."""
    factors: dict[Place, LoraFactors]
    """By layer and module, each of its own rank."""
    on_device: DeviceWeights = field(default_factory=DeviceWeights)

    @cached_property
    def target_modules(self) -> frozenset[str]:
        return frozenset(module for _, module in self.factors)

    @cached_property
    def changes_head(self) -> bool:
        return "lm_head" in self.target_modules or "lm_head" in self.on_device.trained

    @cached_property
    def target_groups(self) -> list[str]:
        """The groups of fused modules that it changes."""
        changed = set(map(group_of, self.target_modules))
        return [group for group in TARGET_GROUPS if group in changed]


@dataclass(frozen=True)
class AdapterOutline:
    """What a folder holds, told without reading its weights."""

    weights: StoredWeights

    @property
    def rank(self) -> int:
        return max(factors.rank for factors in self.weights.factors.values())

    @property
    def target_modules(self) -> frozenset[str]:
        return frozenset(module for _, module in self.weights.factors)


def check_adapter(folder: Path, model: ModelConfig) -> AdapterOutline:
    """Check all that config and header of the weights tell; no weight is read.

    Raises BadInput, naming the file and the setting or key, for an adapter that cannot be served
    exactly.
    """
    config = read_config(folder)
    selection = select(folder, config, model)
    return AdapterOutline(find_weights(folder, config, selection, model))


def load_adapter(
    name: str, folder: Path, outline: AdapterOutline, model: ModelConfig, base: DecoderWeights
) -> Adapter:
    """Read an adapter's PEFT folder, in the type of the base weights.

    Raises BadInput for weights that are not finite in that type, for copies of base weights that
    differ from them, if there is no room on the device, and if the files change meanwhile.
    """
    stored, stamp = outline.weights, _stamp(folder)
    check_base_copies(folder, stored.base_copies, base)
    check_tied(folder, stored)
    factors, gains = read_factors(folder, stored.factors, model, base)
    trained = read_trained(folder, stored, base)
    on_device = DeviceWeights(stack_gains(gains, model, base.device), trained)
    revision = revision_of(folder)
    if _stamp(folder) != stamp:
        raise BadInput(f"{folder}: its files were changed while they were read; load it again.")
    return Adapter(name, str(folder), revision, outline.rank, factors, on_device)


def _stamp(folder: Path) -> list[tuple[int, int, int]]:
    """What changes with the files."""
    found = [os.stat(path) for path in (folder / CONFIG_FILE, weights_file(folder))]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def revision_of(folder: Path) -> str:
    """A hash of what decides the adapter's answers: its configuration and its weights.

    Raises BadInput if either cannot be read.
    """
    digest = hashlib.sha256()
    # Settings in any order are the same; patterns are not, of which the first that matches counts.
    settings = dict(sorted(read_settings(folder).items()))
    digest.update(json.dumps(settings).encode())
    path = weights_file(folder)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    return digest.hexdigest()[:16]
