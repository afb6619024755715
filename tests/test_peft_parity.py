"""Adapters of every kind that is served, as PEFT saves them, against transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.job import Job
from tests.test_engine import expected, make_engine, random_jobs, run
from tests.tiny_models import Oracle, make_adapter, make_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: What ``make_adapter`` is told, beside a seed.
ADAPTERS: dict[str, dict[str, object]] = {
    "one": {"rank": 1},
    "largest": {"rank": 256, "target_modules": ["v_proj", "down_proj"]},
    "ranks": {
        "rank": 4,
        "rank_pattern": {
            "^model.layers.1.self_attn.k_proj": 1,
            r"layers\.[02]\.mlp\.(up|down)_proj": 33,
            "q_proj": 7,
        },
    },
    "alphas": {"rank": 6, "alpha_pattern": {r".*\.1\..*": 40, "v_proj": 1, "o_proj": -9.5}},
    "rank-stabilized": {
        "rank": 5,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 12, "0.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 3, "gate_proj|up_proj": 11},
    },
    "some-layers": {"rank": 9, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "a-layer": {"rank": 10, "layers_to_transform": 1},
    "excluded": {"rank": 3, "exclude_modules": ["k_proj", "1.mlp.down_proj"]},
    "excluded-by-pattern": {"rank": 17, "exclude_modules": r".*\.2\.(mlp\.up|self_attn\.q)_proj"},
    "targets-by-pattern": {"rank": 64, "target_modules": r".*\.[12]\..*\.(q|o|gate)_proj"},
    "mica": {"rank": 11, "init_lora_weights": "mica", "target_modules": ["q_proj", "up_proj"]},
    "all-linear": {"rank": 2, "target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_adapter(model_folder, tmp_path_factory.mktemp("adapter"), seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_folder, adapters)


def jobs_of(names: list[str | None], count: int) -> list[Job]:
    jobs = random_jobs(count)
    return [
        job.model_copy(update={"lora": name}) for job, name in zip(jobs, cycle(names), strict=False)
    ]


@pytest.mark.parametrize("max_loras_per_batch", [len(ADAPTERS), 3])
def test_adapters_of_all_kinds_in_one_batch_give_the_tokens_that_peft_gives(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle, max_loras_per_batch: int
) -> None:
    jobs = jobs_of([None, *ADAPTERS], 48)
    engine = make_engine(model_folder, adapters, max_loras_per_batch=max_loras_per_batch)
    assert run(engine, jobs, join_every=6) == expected(oracle, jobs)
    assert engine.counters.max_adapters_in_batch == max_loras_per_batch


def assert_parity(model_folder: Path, folder: Path) -> None:
    """And that the adapter changes something."""
    jobs = jobs_of(["it"], 6)
    engine = make_engine(model_folder, {"it": folder})
    tokens = run(engine, jobs)
    assert tokens == expected(Oracle(model_folder, {"it": folder}), jobs)
    assert tokens != run(engine, [job.model_copy(update={"lora": None}) for job in jobs])


def test_all_linear_in_the_config_itself_is_what_peft_takes_it_for(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT saves the modules that it stands for; others write it down."""
    folder = Path(shutil.copytree(adapters["all-linear"], tmp_path / "copy"))
    edit_config(folder, target_modules="all-linear")
    assert_parity(model_folder, folder)


def test_fan_in_fan_out_changes_nothing(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["ranks"], tmp_path / "copy"))
    edit_config(folder, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        assert_parity(model_folder, folder)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_the_biases_of_a_model_without_any_changes_nothing(
    model_folder: Path, tmp_path: Path, bias: str
) -> None:
    make_adapter(model_folder, tmp_path, rank=5, seed=1, bias=bias)
    assert_parity(model_folder, tmp_path)


def test_keys_with_the_adapters_name_are_those_without(
    model_folder: Path, adapters: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["ranks"], tmp_path / "copy"))
    weights = load_file(folder / WEIGHTS)
    named = {key.replace(".weight", ".default.weight"): weights[key] for key in weights}
    save_file(named, folder / WEIGHTS)
    jobs = jobs_of(["ranks"], 6)
    assert run(make_engine(model_folder, {"ranks": folder}), jobs) == expected(oracle, jobs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_stored_in_two_bytes_give_the_tokens_that_peft_gives(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = Path(shutil.copytree(adapters["alphas"], tmp_path / "copy"))
    weights = load_file(folder / WEIGHTS)
    save_file({key: tensor.to(dtype) for key, tensor in weights.items()}, folder / WEIGHTS)
    assert_parity(model_folder, folder)


def test_patterns_count_in_the_order_of_the_file(
    model_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT saves them sorted, and reads them in whatever order they stand."""
    alphas = {"[vo]_proj": 0.5, "q_proj": 40, ".*": 3}
    for number, items in enumerate((alphas.items(), reversed(alphas.items()))):
        folder = Path(shutil.copytree(adapters["one"], tmp_path / f"{number}"))
        edit_config(folder, alpha_pattern=dict(items))
        assert_parity(model_folder, folder)


def edit_config(folder: Path, **settings: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_all_adapters_answer_differently(oracle: Oracle) -> None:
    """Else a mix-up of adapters would go unseen in the tests above."""
    answers = {tuple(oracle.generate([5, 6, 7], name, 12)) for name in [None, *ADAPTERS]}
    assert len(answers) == len(ADAPTERS) + 1
