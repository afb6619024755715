"""A worker's settings: the command line's flags, checked, with their defaults filled in."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from schemas.errors import BadInput
from schemas.faults import plain
from schemas.hub import HubSource
from schemas.keys import QUEUE_NAME
from worker.lora_path import LoraPath
from worker.model.config import TARGET_MODULES

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Seconds for which who waits unserved has patience: an adapter until one with a slot makes room
#: for it, jobs of a low priority until they get a turn beside the highest.
PATIENCE = 30.0


def _known_modules(given: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names, which may stand apart by spaces or by commas."""
    if given is None:
        return None
    modules = tuple(module for value in given for module in value.split(",") if module)
    if modules == ("all",):
        return TARGET_MODULES
    if unknown := [module for module in modules if module not in TARGET_MODULES]:
        raise ValueError(
            f"should be 'all', or some of {', '.join(TARGET_MODULES)} (found {', '.join(unknown)})"
        )
    return modules


Positive = Annotated[int, Field(ge=1)]
TargetModules = Annotated[tuple[str, ...] | None, AfterValidator(_known_modules)]


def _known_owners(owners: tuple[str, ...]) -> tuple[str, ...]:
    for owner in owners:
        source = HubSource.parse(f"{owner}/x")
        if source is None or source.owner != owner:
            raise ValueError(f"should be users or organizations of the hub (found {owner})")
    return owners


def _queue_name(name: str) -> str:
    if not re.fullmatch(QUEUE_NAME, name):
        raise ValueError(
            "cannot name a queue: use up to 64 letters, digits and . _ -, a letter or digit first"
        )
    return name


QueueName = Annotated[str, AfterValidator(_queue_name)]
HubOwners = Annotated[tuple[str, ...], AfterValidator(_known_owners)]


class FetcherConfig(BaseModel):
    """All settings of a fetcher; names are those of the flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_path: Path
    hub_owners: HubOwners
    max_lora_rank: Positive | None = None
    lora_target_modules: TargetModules = None
    queue: QueueName = "lorry"
    redis_url: str | None = None
    redis_password_file: Path | None = None
    end_with: int | None = None
    """Process without which it ends."""

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> FetcherConfig:
        """Check parsed flags; raises BadInput that names the flag."""
        try:
            return cls(**flags)
        except ValidationError as error:
            raise BadInput(_first_problem(error)) from error


class WorkerConfig(BaseModel):
    """All settings of a worker; names are those of the flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_path: Path
    repository: str | None = None
    """That of the hub that the folder holds, by its name."""
    enable_lora: bool = False
    lora_paths: tuple[LoraPath, ...] = ()
    lora_root: tuple[Path, ...] = ()
    hub_owners: HubOwners = ()
    with_fetcher: bool = False
    max_loras_per_batch: Positive = 8
    max_loaded_loras: Positive | None = None
    lora_eviction_policy: Literal["lru", "fifo"] = "lru"
    max_lora_rank: Positive | None = None
    lora_target_modules: TargetModules = None
    lora_backend: Literal["triton", "torch"] | None = None
    max_running_requests: Positive | None = None
    max_total_tokens: Positive | None = None
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] | None = None
    chunked_prefill_size: Positive | None = None
    disable_prefix_cache: bool = False
    context_length: Positive | None = None
    device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    queue: QueueName = "lorry"
    redis_url: str | None = None
    max_attempts: Annotated[int, Field(ge=1, le=1000)] | None = None
    redis_password_file: Path | None = None
    lease_seconds: Annotated[float, Field(ge=1, le=86400)] = 30.0
    patience: Annotated[float, Field(gt=0, le=86400)] = PATIENCE
    burst: bool = False

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> WorkerConfig:
        """Check parsed flags; raises BadInput that names the flag."""
        lora_paths = tuple(LoraPath.parse(text) for text in flags.pop("lora_paths", None) or ())
        try:
            return cls(lora_paths=lora_paths, **flags)
        except ValidationError as error:
            raise BadInput(_first_problem(error)) from error

    @model_validator(mode="after")
    def _flags_agree(self) -> WorkerConfig:
        names = [lora.lora_name for lora in self.lora_paths]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"--lora-paths: {', '.join(twice)} is given twice")
        num_pinned = sum(lora.pinned for lora in self.lora_paths)
        if num_pinned > self.max_loras_per_batch - 1:
            raise ValueError(
                f"--lora-paths: {num_pinned} adapters are pinned; at most --max-loras-per-batch - 1"
                f" = {self.max_loras_per_batch - 1} may be, so that the others find a slot"
            )
        loaded = self.max_loaded_loras
        if loaded is not None and loaded < self.max_loras_per_batch:
            raise ValueError(
                f"--max-loaded-loras {loaded} is below --max-loras-per-batch"
                f" {self.max_loras_per_batch}; a batch's adapters must all be in host memory"
            )
        if self.has_lora and not names and not (self.max_lora_rank and self.lora_target_modules):
            raise ValueError(
                "--enable-lora, --lora-root and --hub-owners need --max-lora-rank and"
                " --lora-target-modules (names, or all) where no --lora-paths tell which adapters"
                " will be loaded"
            )
        if self.with_fetcher and not self.hub_owners:
            raise ValueError("--with-fetcher needs --hub-owners: whose repositories it may fetch")
        if missing := [str(root) for root in self.lora_root if not os.path.isdir(root)]:
            raise ValueError(f"--lora-root {missing[0]}: there is no folder of that name")
        if self.max_total_tokens is not None and self.mem_fraction_static is not None:
            raise ValueError("--max-total-tokens and --mem-fraction-static exclude each other")
        if self.resolved_device.type == "cpu" and self.lora_backend == "triton":
            raise ValueError("--lora-backend triton needs --device cuda; on a CPU it is torch")
        if self.resolved_device.type == "cuda" and self.lora_backend == "torch":
            raise ValueError("--lora-backend torch needs --device cpu; on a GPU it is triton")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device; leave it out, or use cpu")
        return self

    @property
    def model_name(self) -> str:
        """What the base model is called in a queue."""
        return self.repository or str(self.model_path)

    @property
    def has_lora(self) -> bool:
        """Whether adapters can be served, from the start or loaded later."""
        return self.enable_lora or bool(self.lora_paths or self.lora_root or self.hub_owners)

    @property
    def resolved_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def resolved_dtype(self, stored: torch.dtype) -> torch.dtype:
        """float32 on a CPU, what the model is stored in on a GPU, unless a flag says otherwise."""
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        return torch.float32 if self.resolved_device.type == "cpu" else stored

    @property
    def running_limit(self) -> int:
        """Sequences that run at once."""
        return self.max_running_requests or (48 if self.resolved_device.type == "cpu" else 256)

    @property
    def prefill_limit(self) -> int:
        """Prompt tokens in one batch."""
        return self.chunked_prefill_size or (512 if self.resolved_device.type == "cpu" else 8192)


def _first_problem(error: ValidationError) -> str:
    """One sentence of a pydantic error, with the flag in place of the field."""
    problem = error.errors()[0]
    message = plain(problem["msg"])
    if not problem["loc"]:
        return message
    flag = "--" + str(problem["loc"][0]).replace("_", "-")
    given = problem["input"]
    # As it was typed; a single value in quotes, since it may be empty.
    shown = " ".join(given) if isinstance(given, list) else json.dumps(given, default=str)
    return f"{flag} {shown}: {message}"
