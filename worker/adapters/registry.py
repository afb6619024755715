"""The adapters that this worker can run, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from schemas.adapter import AdapterRecord
from schemas.errors import BadInput
from worker.adapters.peft_format import Adapter, load_adapter
from worker.config import LoraPath, WorkerConfig
from worker.model.config import LINEAR_MODULES, ModelConfig


class AdapterRegistry:
    """Holds every adapter of ``--lora-paths`` in host memory."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = dict(adapters)

    def get(self, name: str) -> Adapter | None:
        return self._adapters.get(name)

    @property
    def revisions(self) -> dict[str, str]:
        """Name -> revision."""
        return {name: adapter.revision for name, adapter in self._adapters.items()}

    @property
    def records(self) -> dict[str, AdapterRecord]:
        """What this worker adds to the queue's desired state."""
        return {
            name: AdapterRecord(
                source=adapter.source, revision=adapter.revision, pinned=adapter.pinned
            )
            for name, adapter in self._adapters.items()
        }

    @property
    def all(self) -> list[Adapter]:
        return list(self._adapters.values())

    @property
    def pinned(self) -> list[Adapter]:
        return [adapter for adapter in self._adapters.values() if adapter.pinned]

    @property
    def max_rank(self) -> int:
        return max((adapter.rank for adapter in self._adapters.values()), default=0)

    @property
    def target_modules(self) -> frozenset[str]:
        return frozenset().union(*(a.target_modules for a in self._adapters.values()))


def load_registry(config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> AdapterRegistry:
    """Load all of ``--lora-paths``; raises BadInput for the first that cannot be served."""
    adapters: dict[str, Adapter] = {}
    for lora in config.lora_paths:
        adapter = _load(lora, model, dtype)
        _check_limits(adapter, config)
        adapters[lora.lora_name] = adapter
    return AdapterRegistry(adapters)


def _load(lora: LoraPath, model: ModelConfig, dtype: torch.dtype) -> Adapter:
    folder = Path(lora.lora_path)
    if not folder.is_dir():
        raise BadInput(f"--lora-paths {lora.lora_name}: there is no folder {folder}.")
    try:
        return load_adapter(lora.lora_name, folder.resolve(), model, dtype, pinned=lora.pinned)
    except BadInput as error:
        raise BadInput(f"--lora-paths {lora.lora_name}: {error}") from error


def _check_limits(adapter: Adapter, config: WorkerConfig) -> None:
    if config.max_lora_rank is not None and adapter.rank > config.max_lora_rank:
        raise BadInput(
            f"--lora-paths {adapter.name}: its rank {adapter.rank} is above --max-lora-rank"
            f" {config.max_lora_rank}; raise the flag."
        )
    allowed = set(config.lora_target_modules or LINEAR_MODULES)
    if beyond := sorted(adapter.target_modules - allowed):
        raise BadInput(
            f"--lora-paths {adapter.name}: it changes {', '.join(beyond)}, which"
            " --lora-target-modules leaves out; add them to the flag, or give 'all'."
        )
