"""Puts the parts of an engine together that stand in the device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import psutil
import structlog
import torch

from schemas.errors import BadInput
from worker.adapters.loader import AdapterLimits
from worker.adapters.slot_memory import bytes_of_slots, spare_rows
from worker.adapters.slots import AdapterSlots, rank_capacity, rank_levels
from worker.config import WorkerConfig
from worker.device_memory import is_out_of_memory
from worker.kv_cache import KVCache, num_pages
from worker.model.config import ModelConfig
from worker.model.decoder import Decoder
from worker.model.weights import DecoderWeights, load_weights, random_weights
from worker.model_runner import ModelRunner

log = structlog.get_logger()


def build_runner(
    config: WorkerConfig,
    model: ModelConfig,
    weights: DecoderWeights,
    slots: AdapterSlots | None,
    context_length: int,
    pages: int,
) -> ModelRunner:
    """What runs batches, with a KV cache of so many pages, and CUDA graphs on a GPU."""
    # One page more than the pool hands out, for rows that belong to no sequence.
    cache = KVCache(model, pages + 1, weights.device, weights.dtype)
    runner = ModelRunner(
        Decoder(model, weights, cache, slots.memory.weights if slots else {}, context_length),
        max_running=config.running_limit,
        max_pages=num_pages(context_length),
        unused_page=pages,
        device=weights.device,
    )
    runner.warm_up(
        max_prefill_tokens=config.prefill_limit,
        max_adapters=config.max_loras_per_batch,
        rank_levels=rank_levels(slots.capacity) if slots else [],
    )
    return runner


def bytes_to_run(build: Callable[[int], ModelRunner]) -> int:
    """Memory of a GPU that graphs and the largest batch take: tried out with a cache of one page.

    What CUDA's libraries load when they are first used counts too.
    """
    free, _ = torch.cuda.mem_get_info()
    runner = build(1)
    torch.cuda.synchronize()
    left, _ = torch.cuda.mem_get_info()
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    log.info("memory_to_run", megabytes=(free - left) >> 20)
    return free - left


def _stacks_adapters(device: torch.device) -> bool:
    return device.type == "cuda"


def load_weights_and_slots(
    config: WorkerConfig,
    model: ModelConfig,
    limits: AdapterLimits,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[DecoderWeights, AdapterSlots | None]:
    """The base weights, and the slots; None for a worker without adapters.

    Raises BadInput, naming the flags, if there is no memory for the slots.
    """
    if not config.has_lora:
        return _load_weights(config, model, device, dtype, {}), None
    # On a GPU the slots' A stand behind the base weights, so that one product makes both.
    is_stacked = _stacks_adapters(device)
    capacity = rank_capacity(config.max_loras_per_batch, limits.max_rank)
    spare = spare_rows(model, limits.target_modules, capacity) if is_stacked else {}
    needed = bytes_of_slots(model, limits.target_modules, capacity, dtype)
    no_room = BadInput(
        f"--max-lora-rank {limits.max_rank} and --max-loras-per-batch {config.max_loras_per_batch}:"
        f" slots for them take {needed / 1e9:,.1f} GB, which do not fit in memory together with the"
        " base model. Lower one of them, or serve a smaller model."
    )
    # Asked first: numbers that are far too large are beyond what torch can be asked for, and a
    # system that promises more than it has would kill the worker while it makes them zero.
    if needed > _free_bytes(device):
        raise no_room
    try:
        weights = _load_weights(config, model, device, dtype, spare)
        slots = AdapterSlots(
            model,
            num_slots=config.max_loras_per_batch,
            max_rank=limits.max_rank,
            target_modules=limits.target_modules,
            device=device,
            dtype=dtype,
            stacked=weights if is_stacked else None,
            policy=config.lora_eviction_policy,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise no_room from error
    return weights, slots


def _load_weights(
    config: WorkerConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    spare: Mapping[str, int],
) -> DecoderWeights:
    if config.load_format == "dummy":
        return random_weights(model, device, dtype, spare)
    return load_weights(config.model_path, model, device, dtype, spare)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)
