"""Reads adapters from their folders, held against the model and this worker's limits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.errors import BadInput
from worker.adapters.peft_format import Adapter, load_adapter, revision_of
from worker.model.config import ModelConfig


@dataclass(frozen=True)
class AdapterLoader:
    """``max_rank`` and ``target_modules`` are None while nothing limits them."""

    model: ModelConfig
    dtype: torch.dtype
    max_rank: int | None
    target_modules: Collection[str] | None

    def load(self, name: str, folder: Path) -> Adapter:
        """Raises BadInput for an adapter that cannot be served."""
        if not folder.is_dir():
            raise BadInput(f"there is no folder {folder}.")
        adapter = load_adapter(name, folder, self.model, self.dtype)
        if self.max_rank is not None and adapter.rank > self.max_rank:
            raise BadInput(
                f"its rank {adapter.rank} is above --max-lora-rank {self.max_rank}; raise the flag."
            )
        allowed = adapter.target_modules if self.target_modules is None else self.target_modules
        if beyond := sorted(adapter.target_modules - set(allowed)):
            raise BadInput(
                f"it changes {', '.join(beyond)}, which --lora-target-modules leaves out; add them"
                " to the flag, or give 'all'."
            )
        return adapter

    def revision(self, folder: Path) -> str:
        """A hash of what decides the adapter's answers; raises BadInput if it cannot be read."""
        if not folder.is_dir():
            raise BadInput(f"there is no folder {folder}.")
        try:
            return revision_of(folder)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder}: cannot be read: {error}") from error
