"""Puts the parts of an engine together that stand in the device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import structlog
import torch

from worker.adapters.loader import AdapterLimits
from worker.adapters.slot_memory import spare_rows
from worker.adapters.slots import AdapterSlots, rank_capacity, rank_levels
from worker.config import WorkerConfig
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
    """The base weights, and the slots; None for a worker without adapters."""
    # On a GPU the slots' A stand behind the base weights, so that one product makes both.
    is_stacked = config.has_lora and _stacks_adapters(device)
    capacity = rank_capacity(config.max_loras_per_batch, limits.max_rank) if is_stacked else 0
    spare = spare_rows(model, limits.target_modules, capacity)
    if config.load_format == "dummy":
        weights = random_weights(model, device, dtype, spare)
    else:
        weights = load_weights(config.model_path, model, device, dtype, spare)
    if not config.has_lora:
        return weights, None
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
    return weights, slots
