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
from typing import Any

import torch

from schemas.errors import BadInput
from worker.adapters.device_weights import DeviceWeights, stack_gains
from worker.adapters.files import open_file
from worker.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE, read_config, read_settings
from worker.adapters.peft_targets import Place, module_names, select
from worker.adapters.peft_tensors import (
    check_base_copy,
    check_tied,
    is_finite,
    make_factors,
    place_trained,
)
from worker.adapters.peft_weights import (
    LoraFactors,
    StoredWeights,
    find_weights,
    weights_file,
    with_current_names,
)
from worker.adapters.safetensors_file import SafetensorsFile
from worker.model.config import TARGET_GROUPS, ModelConfig, group_of
from worker.model.weights import DecoderWeights


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory. Equal only to itself: a name may be loaded anew."""

    name: str
    """Under which it was read first: names of one revision share it."""
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


#: What changes with a folder's files: of each the inode, size and time.
Stamp = list[tuple[int, int, int]]


@dataclass(frozen=True)
class AdapterOutline:
    """What a folder holds, told without reading its weights."""

    weights: StoredWeights
    file: SafetensorsFile
    stamp: Stamp
    base_repository: str | None
    """What it was trained on, as it says."""

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
    stamp = _stamp(folder)
    config = read_config(folder, module_names(model))
    selection = select(folder, config, model)
    file = with_current_names(SafetensorsFile.open(weights_file(folder)), model)
    weights = find_weights(file.path, file.tensors, config, selection, model)
    return AdapterOutline(weights, file, stamp, config.base_repository)


def load_adapter(
    name: str, folder: Path, outline: AdapterOutline, model: ModelConfig, base: DecoderWeights
) -> Adapter:
    """Read an adapter's PEFT folder, in the type of the base weights.

    Raises BadInput for weights that are not finite in that type, for copies of base weights that
    differ from them, if there is no room on the device, and if the files change meanwhile.
    """
    path, stored = outline.file.path, outline.weights
    digest, tensors = _hash_of_settings(folder), dict[str, torch.Tensor]()
    for key, tensor in outline.file.read(digest):
        if module := stored.base_copies.get(key):
            # Not kept: it is larger than the adapter.
            check_base_copy(path, key, tensor, module, base)
        else:
            tensors[key] = tensor
    _check_unchanged(folder, outline)
    check_tied(path, tensors, stored)
    factors, gains = make_factors(path, tensors, stored.factors, model, base)
    trained = place_trained(path, tensors, stored, base)
    on_device = DeviceWeights(stack_gains(gains, model, base.device), trained)
    return Adapter(name, str(folder), _revision(digest), outline.rank, factors, on_device)


def check_numbers(folder: Path, outline: AdapterOutline) -> str:
    """The revision of an adapter whose numbers are all finite.

    Raises BadInput, naming the key, if one is not, and if the files change meanwhile.
    """
    digest = _hash_of_settings(folder)
    for key, tensor in outline.file.read(digest):
        if not is_finite(tensor):
            raise BadInput(f"{outline.file.path}: {key} holds NaN or infinite values.")
    _check_unchanged(folder, outline)
    return _revision(digest)


def revision_of(folder: Path) -> str:
    """A hash of what decides the adapter's answers: its configuration and its weights.

    Raises BadInput if either cannot be read.
    """
    digest, path = _hash_of_settings(folder), weights_file(folder)
    try:
        with open_file(path) as file:
            hashlib.file_digest(file, lambda: digest)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    return _revision(digest)


def _hash_of_settings(folder: Path) -> Any:
    # Settings in any order are the same; patterns are not, of which the first that matches counts.
    settings = dict(sorted(read_settings(folder).items()))
    return hashlib.sha256(json.dumps(settings).encode())


def _revision(digest: Any) -> str:
    return str(digest.hexdigest()[:16])


def _stamp(folder: Path) -> Stamp:
    try:
        found = [os.stat(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError:
        return []  # Whoever reads them tells what is wrong.
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def _check_unchanged(folder: Path, outline: AdapterOutline) -> None:
    if _stamp(folder) != outline.stamp:
        raise BadInput(f"{folder}: its files were changed while they were read; load it again.")
