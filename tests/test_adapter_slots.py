"""Slots and registry: which adapters stand in memory, and that each answers as itself."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kernels.lora_expand import lora_expand_torch
from kernels.lora_segments import Segment
from kernels.lora_shrink import lora_shrink_torch
from schemas.errors import BadInput
from schemas.job import Job
from tests.tiny_models import make_adapter, make_llama
from worker.adapters import peft_tensors
from worker.adapters.at_start import load_registry
from worker.adapters.loader import AdapterLoader, find_limits
from worker.adapters.peft_format import Adapter, LoraFactors
from worker.adapters.peft_targets import Place
from worker.adapters.registry import AdapterRegistry
from worker.adapters.slot_memory import bytes_of_slots, spare_rows
from worker.adapters.slots import AdapterSlots, rank_capacity
from worker.adapters.sources import find_adapters
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.lora_path import LoraPath
from worker.model.config import (
    END_MODULES,
    LINEAR_GROUPS,
    LINEAR_MODULES,
    TARGET_MODULES,
    ModelConfig,
)
from worker.model.families import Family, LayerConfig, Scales
from worker.model.rotary import Rotary
from worker.model.weights import load_weights, random_weights

MODEL = ModelConfig(
    family=Family(),
    vocab_size=11,
    hidden_size=18,
    intermediate_size=23,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    layers=(LayerConfig(Rotary((1.0, 0.1, 0.01))),) * 2,
    biased_modules=(),
    activation="silu",
    scales=Scales(6**-0.5),
    rms_norm_eps=1e-5,
    max_position=64,
    tie_word_embeddings=True,
    eos_token_ids=frozenset(),
    dtype=torch.float32,
)
MAX_RANK = 32

#: Products of up to 23 + 32 terms below 600 in sum, each rounded to float32.
TOLERANCE = 55 * 600 * 2.0**-24


def random_adapter(
    name: str,
    *,
    rank: int = MAX_RANK,
    modules: Collection[str] = LINEAR_MODULES,
    seed: int = 0,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors: dict[Place, LoraFactors] = {}
    for layer in (*range(MODEL.num_layers), None):
        for module in END_MODULES if layer is None else LINEAR_MODULES:
            if module not in modules:
                continue
            out_features, in_features = MODEL.linear_shape(module)
            a = torch.randn(rank, in_features, generator=generator)
            b = torch.randn(rank, out_features, generator=generator)
            factors[layer, module] = LoraFactors(a, b)
    return Adapter(name, "source", "revision", rank, factors)


def make_slots(
    num_slots: int,
    modules: Collection[str] = LINEAR_MODULES,
    *,
    stacked: bool = False,
    policy: str = "lru",
) -> AdapterSlots:
    spare = spare_rows(MODEL, modules, rank_capacity(num_slots, MAX_RANK))
    weights = random_weights(MODEL, torch.device("cpu"), torch.float32, spare)
    return AdapterSlots(
        MODEL,
        num_slots=num_slots,
        max_rank=MAX_RANK,
        target_modules=frozenset(modules),
        device=torch.device("cpu"),
        dtype=torch.float32,
        stacked=weights if stacked else None,
        policy=policy,
    )


def names(slots: AdapterSlots) -> list[str]:
    return [adapter.name for adapter in slots.resident]


def assert_slot_computes(slots: AdapterSlots, adapter: Adapter) -> None:
    """Every layer's and group's product equals the formula in float64; 0 for a module that the
    adapter leaves alone."""
    segments = [Segment(0, 4, slots.first_rank(adapter), adapter.rank)]
    for seed, ((layer, group), weights) in enumerate(slots.memory.weights.items()):
        if layer is None and group not in adapter.target_groups:
            continue  # No row of the adapter comes there.
        modules = MODEL.parts_of(group)
        x = torch.randn(4, weights.a.shape[1], generator=torch.Generator().manual_seed(seed))
        y = torch.zeros(4, sum(MODEL.linear_shape(module)[0] for module in modules))
        h = lora_shrink_torch(x, weights.a, segments, len(modules))
        lora_expand_torch(y, h, weights.b, segments, weights.part_sizes)
        expected = []
        for module in modules:
            if factors := adapter.factors.get((layer, module)):
                expected.append(x.double() @ factors.a.double().t() @ factors.b.double())
            else:
                expected.append(torch.zeros(4, MODEL.linear_shape(module)[0]).double())
        torch.testing.assert_close(y.double(), torch.cat(expected, dim=1), rtol=0, atol=TOLERANCE)


# --- Which slot ---------------------------------------------------------------------------------


def test_adapters_take_empty_slots_first() -> None:
    slots = make_slots(3)
    assert {slots.place(random_adapter(name), ()) for name in "abc"} == {0, MAX_RANK, 2 * MAX_RANK}


def test_small_adapters_share_the_room_of_a_large_one() -> None:
    slots = make_slots(1)
    ranks = {"a": 3, "b": 1, "c": 2}
    for name, rank in ranks.items():
        slots.place(random_adapter(name, rank=rank), ())
    assert names(slots) == ["a", "b", "c"]


def test_a_large_adapter_takes_the_place_of_small_ones_that_are_not_in_use() -> None:
    slots = make_slots(2)
    used, *others = (random_adapter(name, rank=16) for name in "abcd")
    for adapter in (used, *others):
        slots.place(adapter, ())
    large = random_adapter("large", seed=1)
    assert slots.place(large, in_use={used, large}) == MAX_RANK
    assert names(slots) == ["a", "b", "large"]


def test_empty_places_are_taken_before_any_adapter_loses_its_own() -> None:
    slots = make_slots(4, stacked=True)
    adapters = [random_adapter(name, seed=i) for i, name in enumerate("abcd")]
    for adapter in 3 * adapters:
        slots.place(adapter, in_use={adapter})
    assert slots.num_loads == 4


def test_of_ranks_under_the_base_weights_the_lowest_level_is_loaded_over() -> None:
    """Those up to the level in use are computed for every row."""
    slots = make_slots(4, stacked=True)
    a, b, c, d, e, f = (random_adapter(name, seed=i) for i, name in enumerate("abcdef"))
    for adapter in (c, d, a, b, c, d):  # c and d stand lowest, a and b were unused for longest.
        slots.place(adapter, in_use=())
    assert slots.place(e, in_use=()) == 0
    assert slots.num_ranks([d, e]) == 64
    assert slots.place(f, in_use={d, e}) == 64
    assert slots.num_ranks([d, e, f]) == 96
    assert slots.num_ranks([]) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2)), max_size=40))
def test_whatever_is_in_use_an_adapter_finds_a_place_of_its_own(
    uses: list[tuple[int, list[int]]],
) -> None:
    """Three slots: each step places one adapter, of any rank, while up to two of those that stand
    in a slot are in use."""
    slots = make_slots(3, modules=())
    adapters = [Adapter(f"{n}", "", "", 1 + 7 * n % MAX_RANK, {}) for n in range(10)]
    for number, others in uses:
        in_use = {adapters[n] for n in others if f"{n}" in names(slots)} | {adapters[number]}
        before = {a: slots.first_rank(a) for a in in_use if a in slots.resident}
        slots.place(adapters[number], in_use)
        assert {a: slots.first_rank(a) for a in before} == before
        ranks = [
            rank
            for a in adapters
            if a in slots.resident
            for rank in range(slots.first_rank(a), slots.first_rank(a) + a.rank)
        ]
        assert len(ranks) == len(set(ranks))
        assert set(ranks) <= set(range(slots.capacity))


def test_the_least_recently_used_adapter_is_evicted() -> None:
    slots, (a, b, c) = make_slots(2), map(random_adapter, "abc")
    for adapter in (a, b, a, c):
        slots.place(adapter, ())
    assert sorted(names(slots)) == ["a", "c"]


def test_by_fifo_the_first_one_that_came_is_evicted() -> None:
    slots, (a, b, c, d) = make_slots(2, policy="fifo"), map(random_adapter, "abcd")
    for adapter in (a, b, a, c):
        slots.place(adapter, ())
    assert sorted(names(slots)) == ["b", "c"]
    slots.place(d, in_use={b})
    assert sorted(names(slots)) == ["b", "d"]


def test_an_adapter_in_use_is_not_evicted() -> None:
    slots, (a, b, c) = make_slots(2), map(random_adapter, "abc")
    for adapter in (a, b):
        slots.place(adapter, ())
    slots.place(c, in_use={a, c})
    assert sorted(names(slots)) == ["a", "c"]


def test_a_pinned_adapter_is_not_evicted() -> None:
    slots = make_slots(2)
    pinned = random_adapter("pinned")
    slots.pinned = frozenset({pinned})
    slots.place(pinned, ())
    for name in "abcab":
        slots.place(random_adapter(name), ())
    assert sorted(names(slots)) == ["b", "pinned"]


def test_no_slot_is_given_while_all_are_in_use() -> None:
    slots, (a, b, c) = make_slots(2), map(random_adapter, "abc")
    slots.place(a, ())
    slots.place(b, ())
    with pytest.raises(RuntimeError, match="all 2 slots are in use"):
        slots.place(c, in_use={a, b, c})


def test_placing_again_gives_the_same_slot() -> None:
    slots, (a, b) = make_slots(2), map(random_adapter, "ab")
    first = slots.place(a, ())
    slots.place(b, ())
    assert slots.place(a, ()) == first


def test_placing_again_does_not_load_again() -> None:
    slots, a = make_slots(2), random_adapter("a")
    slots.place(a, ())
    slots.memory.weights[0, "o_proj"].a.fill_(7)
    slots.place(a, ())
    assert (slots.memory.weights[0, "o_proj"].a == 7).all()


def test_an_adapter_loaded_anew_under_its_name_is_another_one() -> None:
    slots, old, new = make_slots(2), random_adapter("a"), random_adapter("a", seed=5)
    slots.place(old, ())
    slots.place(new, in_use={old, new})
    assert_slot_computes(slots, new)


# --- What a slot computes -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, MAX_RANK])
@pytest.mark.parametrize(
    "modules",
    [TARGET_MODULES, ("k_proj", "down_proj"), ("v_proj", "up_proj", "lm_head"), ("embed_tokens",)],
    ids=" ".join,
)
def test_a_slot_computes_its_adapters_product(rank: int, modules: tuple[str, ...]) -> None:
    slots, adapter = make_slots(2, TARGET_MODULES), random_adapter("a", rank=rank, modules=modules)
    slots.place(adapter, ())
    assert_slot_computes(slots, adapter)


def test_each_slot_computes_its_own_adapters_product() -> None:
    slots = make_slots(4)
    ranks = {"a": 1, "b": 3, "c": MAX_RANK, "d": 2}
    adapters = [random_adapter(name, rank=rank, seed=rank) for name, rank in ranks.items()]
    for adapter in adapters:
        slots.place(adapter, ())
    for adapter in adapters:
        assert_slot_computes(slots, adapter)


@pytest.mark.parametrize("modules", [TARGET_MODULES, ("k_proj",), ("gate_proj", "lm_head")])
def test_a_smaller_adapter_over_a_larger_one_leaves_no_trace_of_it(
    modules: tuple[str, ...],
) -> None:
    slots = make_slots(1, TARGET_MODULES)
    slots.place(random_adapter("large", rank=MAX_RANK, modules=TARGET_MODULES, seed=1), ())
    small = random_adapter("small", rank=3, modules=modules, seed=2)
    slots.place(small, ())
    assert_slot_computes(slots, small)


def test_modules_of_smaller_ranks_leave_no_trace_of_what_stood_in_the_slot() -> None:
    slots = make_slots(1)
    slots.place(random_adapter("large", rank=MAX_RANK, seed=1), ())
    whole = random_adapter("mixed", rank=20, seed=2)
    ranks = zip(whole.factors.items(), cycle((1, 20, 7, 3)), strict=False)
    factors = {place: LoraFactors(f.a[:rank], f.b[:rank]) for (place, f), rank in ranks}
    mixed = replace(whole, factors=factors)
    slots.place(mixed, ())
    assert_slot_computes(slots, mixed)


def test_an_adapter_laid_out_for_a_gpu_is_in_memory_once() -> None:
    slots, adapter = (
        make_slots(1, TARGET_MODULES),
        random_adapter("a", rank=7, modules=TARGET_MODULES),
    )
    before = {place: (factors.a, factors.b) for place, factors in adapter.factors.items()}
    pieces = slots.memory._pack(adapter, page_locked=False)
    slots.memory._share(adapter, pieces)
    laid_out = {piece.memory.untyped_storage().data_ptr() for piece in pieces}
    for place, (a, b) in before.items():
        factors = adapter.factors[place]
        assert factors.a.equal(a)
        assert factors.b.equal(b)
        assert factors.a.untyped_storage().data_ptr() in laid_out
        assert factors.b.untyped_storage().data_ptr() in laid_out


def test_loading_a_slot_leaves_its_neighbours_alone() -> None:
    slots = make_slots(3)
    a, b, c, d = (random_adapter(name, rank=MAX_RANK, seed=ord(name)) for name in "abcd")
    for adapter in (a, b, c):
        slots.place(adapter, ())
    slots.place(d, in_use={a, c, d})
    assert_slot_computes(slots, a)
    assert_slot_computes(slots, c)


def test_an_adapter_that_changes_no_end_pays_for_none() -> None:
    """Where others may, ends of a large vocabulary would be most of its bytes."""
    slots = make_slots(2, TARGET_MODULES)
    ends = random_adapter("ends", modules=TARGET_MODULES)
    plain = random_adapter("plain")
    assert slots.num_bytes(plain) == make_slots(2).num_bytes(plain)
    numbers = 2 * MAX_RANK * (MODEL.vocab_size + MODEL.hidden_size)
    assert slots.num_bytes(ends) - slots.num_bytes(plain) == 4 * numbers


def test_groups_that_no_adapter_may_change_have_no_weights() -> None:
    slots = make_slots(2, modules=("v_proj", "down_proj"))
    assert slots.memory.weights.keys() == {
        (n, g) for n in range(2) for g in ("qkv_proj", "down_proj")
    }


@pytest.mark.parametrize("modules", [("v_proj", "down_proj"), TARGET_MODULES], ids=["some", "all"])
def test_the_bytes_that_slots_take_are_known_before(modules: Collection[str]) -> None:
    slots = make_slots(2, modules=modules)
    taken = sum(made.a.nbytes + made.b.nbytes for made in slots.memory.weights.values())
    assert bytes_of_slots(MODEL, modules, slots.capacity, torch.float32) == taken


@pytest.mark.parametrize(
    ("modules", "groups"),
    [
        (("v_proj",), ["qkv_proj"]),
        (("down_proj", "gate_proj"), ["gate_up_proj", "down_proj"]),
        (("lm_head", "q_proj"), ["qkv_proj", "lm_head"]),
        (TARGET_MODULES, [*LINEAR_GROUPS, *END_MODULES]),
    ],
)
def test_an_adapter_names_the_groups_that_it_changes(
    modules: tuple[str, ...], groups: list[str]
) -> None:
    assert random_adapter("a", modules=modules).target_groups == groups


# --- An adapter that spoils its own answers -----------------------------------------------------


def test_an_adapter_whose_products_overflow_spoils_no_other_jobs_answer(
    model_folder: Path, tmp_path: Path
) -> None:
    """Its keys and values are NaN, and stand on pages that others read past their end or get
    after it."""
    modules = ("k_proj", "v_proj")
    bad = make_adapter(model_folder, tmp_path, rank=2, seed=1, target_modules=modules)
    weights = load_file(bad / "adapter_model.safetensors")
    large = {key: 1e30 * tensor for key, tensor in weights.items()}  # Finite in float32.
    save_file(large, bad / "adapter_model.safetensors")
    engine = Engine(
        WorkerConfig(
            model_path=model_folder,
            lora_paths=(LoraPath(lora_name="bad", lora_path=str(bad)),),
            max_total_tokens=256,
            device="cpu",
        )
    )
    jobs = [
        Job(id="long", prompt_token_ids=list(range(60)), max_tokens=40),
        Job(id="short", prompt_token_ids=[1, 2, 3], max_tokens=40),
    ]
    alone = [answers(engine, [job])[0] for job in jobs]
    spoiled = Job(id="bad", lora="bad", prompt_token_ids=list(range(70)), max_tokens=40)
    assert answers(engine, [spoiled, *jobs])[1:] == alone


def answers(engine: Engine, jobs: list[Job]) -> list[list[int]]:
    sequences = [engine.sequence_of(job) for job in jobs]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(100):
        engine.step()
    return [sequence.output_ids for sequence in sequences]


# --- The registry -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 6 for the queries and the down projection."""
    return make_adapter(
        model_folder,
        tmp_path_factory.mktemp("adapter"),
        rank=6,
        seed=1,
        target_modules=("q_proj", "down_proj"),
    )


def registry(model_folder: Path, folder: Path, **flags: object) -> AdapterRegistry:
    lora = LoraPath(lora_name="mine", lora_path=str(folder), pinned=bool(flags.pop("pinned", 0)))
    config = WorkerConfig.model_validate(
        {"model_path": model_folder, "lora_paths": (lora,), "device": "cpu", **flags}
    )
    return load(config)


def load(config: WorkerConfig) -> AdapterRegistry:
    model = ModelConfig.from_folder(config.model_path)
    found = find_adapters(config.lora_paths)
    limits = find_limits(config, found, model)
    weights = load_weights(config.model_path, model, torch.device("cpu"), torch.float32)
    return load_registry(config, found, AdapterLoader(model, weights, limits))


def refusal(model_folder: Path, folder: Path, **flags: object) -> str:
    with pytest.raises(BadInput) as error:
        registry(model_folder, folder, **flags)
    return str(error.value)


def test_the_registry_knows_an_adapter_by_its_name(model_folder: Path, folder: Path) -> None:
    adapter = registry(model_folder, folder).get("mine")
    assert adapter is not None
    assert adapter.rank == 6


def test_the_registry_knows_no_other_name(model_folder: Path, folder: Path) -> None:
    assert registry(model_folder, folder).get("yours") is None


def test_the_registry_reports_what_the_queue_is_to_know(model_folder: Path, folder: Path) -> None:
    known = registry(model_folder, folder, pinned=True)
    record = known.records["mine"].model_dump()
    revision = known.revisions["mine"]
    assert record == {
        "source": str(folder.resolve()),
        "revision": revision,
        "pinned": True,
        "unloading": None,
        "version": 0,
        "previous": None,
    }


def test_limits_are_inferred_from_adapters_too_that_others_have_evicted(
    model_folder: Path, folder: Path, tmp_path: Path
) -> None:
    small = make_adapter(model_folder, tmp_path, rank=2, seed=2, target_modules=("v_proj",))
    paths = {"large": folder, "small": small}
    config = WorkerConfig(
        model_path=model_folder,
        lora_paths=tuple(LoraPath(lora_name=n, lora_path=str(p)) for n, p in paths.items()),
        max_loaded_loras=1,
        max_loras_per_batch=1,
        device="cpu",
    )
    known = load(config)
    for name in ("large", "small", "large"):
        assert known.get(name)


def test_a_missing_adapter_folder_is_named(model_folder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    expected = f"--lora-paths mine: there is no folder {gone}."
    assert refusal(model_folder, gone) == expected


def test_a_rank_above_the_limit_is_refused_with_both_numbers(
    model_folder: Path, folder: Path
) -> None:
    assert refusal(model_folder, folder, max_lora_rank=5) == (
        "--lora-paths mine: its rank 6 is above --max-lora-rank 5; raise the flag."
    )


def test_a_rank_at_the_limit_is_served(model_folder: Path, folder: Path) -> None:
    assert registry(model_folder, folder, max_lora_rank=6).get("mine")


def test_a_module_outside_the_limit_is_refused_by_name(model_folder: Path, folder: Path) -> None:
    assert refusal(model_folder, folder, lora_target_modules=("q_proj", "v_proj")) == (
        "--lora-paths mine: it changes down_proj, which --lora-target-modules leaves out;"
        " add them to the flag, or give 'all'."
    )


def test_a_module_that_the_model_does_not_have_is_refused_with_those_that_it_has(
    model_folder: Path, folder: Path
) -> None:
    told = refusal(model_folder, folder, lora_target_modules=("q_proj", "gate_up_proj"))
    assert told == (
        "--lora-target-modules: the model has no gate_up_proj; it has q_proj, k_proj, v_proj,"
        " o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head."
    )


def test_all_as_target_modules_allows_every_module(model_folder: Path, folder: Path) -> None:
    assert registry(model_folder, folder, lora_target_modules=("all",)).get("mine")


def test_limits_are_inferred_from_adapters_of_the_ends_too(
    model_folder: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves embeddings along.
        make_adapter(
            *(model_folder, tmp_path),
            rank=2,
            seed=1,
            target_modules=["lm_head", "q_proj"],
            rank_pattern={"lm_head": 5},
        )
    known = registry(model_folder, tmp_path)
    limits = known.loader.limits
    assert (limits.max_rank, set(limits.target_modules)) == (5, {"lm_head", "q_proj"})
    assert registry(model_folder, tmp_path, lora_target_modules=("all",)).get("mine")
    assert refusal(model_folder, tmp_path, lora_target_modules=("q_proj",)) == (
        "--lora-paths mine: it changes lm_head, which --lora-target-modules leaves out;"
        " add them to the flag, or give 'all'."
    )


def test_modules_trained_in_full_need_no_flag(model_folder: Path, tmp_path: Path) -> None:
    """They take no room in the slots."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    make_adapter(model_folder, tmp_path, rank=2, seed=1, **settings)
    assert registry(model_folder, tmp_path, lora_target_modules=("q_proj",)).get("mine")


def test_an_adapter_for_which_the_device_has_no_memory_left_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(model_folder, tmp_path, rank=2, seed=1, target_modules=["q_proj"], use_dora=True)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(peft_tensors, "dora_gain", no_memory)
    assert refusal(model_folder, tmp_path) == (
        "--lora-paths mine: the device's memory is full. Unload other adapters, or start the worker"
        " with a lower --mem-fraction-static or --max-loaded-loras."
    )
