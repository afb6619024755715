"""Reads adapters from their folders, held against the model and this worker's limits."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import structlog
import torch

from schemas.errors import BadInput
from worker.adapters.peft_format import (
    Adapter,
    AdapterOutline,
    check_adapter,
    check_numbers,
    load_adapter,
    revision_of,
)
from worker.adapters.sources import FoundAdapter
from worker.config import WorkerConfig
from worker.model.config import TARGET_MODULES, ModelConfig
from worker.model.weights import DecoderWeights

log = structlog.get_logger()


@dataclass(frozen=True)
class AdapterLimits:
    """What adapters may be for which memory is set aside."""

    max_rank: int
    target_modules: Collection[str]

    def check(self, outline: AdapterOutline) -> None:
        """Raises BadInput, naming the flag, for an adapter that is beyond them."""
        if outline.rank > self.max_rank:
            raise BadInput(
                f"its rank {outline.rank} is above --max-lora-rank {self.max_rank}; raise the flag."
            )
        if beyond := sorted(outline.target_modules.difference(self.target_modules)):
            raise BadInput(
                f"it changes {', '.join(beyond)}, which --lora-target-modules leaves out; add them"
                " to the flag, or give 'all'."
            )


def find_limits(
    config: WorkerConfig, found: Iterable[FoundAdapter], model: ModelConfig
) -> AdapterLimits:
    """What the flags say, or else what the adapters of ``--lora-paths`` need.

    Raises BadInput for a flag that names what the model does not have, and for the first of these
    that cannot be served, as far as can be told without reading weights.
    """
    max_rank, modules = config.max_lora_rank or 0, frozenset(config.lora_target_modules or ())
    if modules.issuperset(TARGET_MODULES):
        modules = frozenset(model.target_modules)
    elif unknown := sorted(modules.difference(model.target_modules)):
        raise BadInput(
            f"--lora-target-modules: the model has no {unknown[0]}; it has"
            f" {', '.join(model.target_modules)}."
        )
    for lora in found:
        try:
            limits = _limits_for(
                _outline(lora.folder, model), config.max_lora_rank, config.lora_target_modules
            )
        except BadInput as error:
            raise BadInput(f"--lora-paths {lora.name}: {error}") from error
        max_rank = max(max_rank, limits.max_rank)
        modules = modules.union(limits.target_modules)
    return AdapterLimits(max_rank, modules)


def _limits_for(
    outline: AdapterOutline, max_rank: int | None, target_modules: Collection[str] | None
) -> AdapterLimits:
    """Those that are given, or else what the adapter needs; raises BadInput if it is beyond."""
    limits = AdapterLimits(max_rank or outline.rank, target_modules or outline.target_modules)
    limits.check(outline)
    return limits


@dataclass(frozen=True)
class AdapterChecker:
    """Says which adapters a worker can serve, as far as that can be told without the weights of the
    base model; ``max_rank`` and ``target_modules`` are None where nothing limits them."""

    model: ModelConfig
    max_rank: int | None
    target_modules: Collection[str] | None

    def revision(self, folder: Path) -> str:
        """A hash of what decides the adapter's answers; raises BadInput for one that cannot be
        served."""
        outline = _outline(folder, self.model)
        _limits_for(outline, self.max_rank, self.target_modules)
        return check_numbers(folder, outline)


@dataclass(frozen=True)
class AdapterLoader:
    """Reads adapters for a base model."""

    model: ModelConfig
    base: DecoderWeights
    limits: AdapterLimits
    repository: str | None = None
    """That of the base model, ``OWNER/NAME``, if it is known."""
    _told: set[tuple[str, str]] = field(default_factory=set, init=False)
    """Names of adapters and repositories of which the log tells that they are of another base."""

    def check(self, folder: Path) -> AdapterOutline:
        """All that can be told without reading weights; raises BadInput for an adapter that cannot
        be served."""
        outline = _outline(folder, self.model)
        self.limits.check(outline)
        return outline

    def load(self, name: str, folder: Path) -> Adapter:
        """Raises BadInput for an adapter that cannot be served."""
        outline = self.check(folder)
        try:
            with _beside_batches(self.base.device):
                adapter = load_adapter(name, folder, outline, self.model, self.base)
        except torch.OutOfMemoryError as error:
            raise BadInput(
                "the device's memory is full. Unload other adapters, or start the worker with a"
                " lower --mem-fraction-static or --max-loaded-loras."
            ) from error
        self._tell_of_another_base(name, outline.base_repository)
        return adapter

    def _tell_of_another_base(self, name: str, base: str | None) -> None:
        """Not refused: the served model may be a copy, or what was trained on from the base."""
        if base is None or self.repository is None or base.lower() == self.repository.lower():
            return
        if (name, base) not in self._told:
            self._told.add((name, base))
            log.warning("adapter_of_another_base", adapter=name, base=base, model=self.repository)

    def revision(self, folder: Path) -> str:
        """A hash of what decides the adapter's answers; raises BadInput if it cannot be read."""
        if not os.path.isdir(folder):
            raise BadInput(f"there is no folder {folder}.")
        try:
            return revision_of(folder)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder}: cannot be read: {error}") from error


@contextmanager
def _beside_batches(device: torch.device) -> Iterator[None]:
    """On a GPU what is launched in here does not wait for batches nor they for it, and has ended
    when this does."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    # It has made the base weights.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loads: torch keeps the memory that it frees for the stream that had it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _outline(folder: Path, model: ModelConfig) -> AdapterOutline:
    if not os.path.isdir(folder):
        raise BadInput(f"there is no folder {folder}.")
    return check_adapter(folder, model)
