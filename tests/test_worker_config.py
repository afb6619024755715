"""The worker's flags: what they accept, and how wrong ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.waiting import PATIENCE
from broker.release import release
from schemas.errors import BadInput
from worker.cli import build_parser
from worker.config import FetcherConfig, WorkerConfig
from worker.lora_path import LoraPath

ROOT = Path(__file__).parents[1]

#: Every flag of the worker, by its SGLang name where SGLang has it.
FLAGS = {
    *("--model-path", "--lora-paths", "--max-loras-per-batch", "--max-loaded-loras"),
    *("--max-lora-rank", "--lora-target-modules", "--enable-lora", "--lora-root"),
    *("--hub-owners", "--with-fetcher"),
    *("--lora-eviction-policy", "--lora-backend", "--max-running-requests"),
    *("--max-total-tokens", "--mem-fraction-static", "--chunked-prefill-size"),
    "--disable-prefix-cache",
    *("--context-length", "--device", "--dtype", "--load-format"),
    *(
        "--queue",
        "--redis-url",
        "--redis-password-file",
        "--lease-seconds",
        "--max-attempts",
        "--patience",
        "--burst",
    ),
}
LIMITS = {"max_lora_rank": 8, "lora_target_modules": ["all"]}
MODULES = (
    "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, qkv_proj, gate_up_proj,"
    " embed_tokens, lm_head"
)


# --- --lora-paths -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "path", "pinned"),
    [
        ("adapters/sql", "sql", "adapters/sql", False),
        ("/data/adapters/sql/", "sql", "/data/adapters/sql/", False),
        ("sql=/data/a", "sql", "/data/a", False),
        ("org/sql-v1.5_b=/data/a", "org/sql-v1.5_b", "/data/a", False),
        ("sql=/data/lr=3/a", "sql", "/data/lr=3/a", False),
        ('{"lora_name": "sql", "lora_path": "/data/a"}', "sql", "/data/a", False),
        (' {"lora_name": "sql", "lora_path": "/a=b", "pinned": true}', "sql", "/a=b", True),
    ],
)
def test_a_lora_path_is_read_in_its_three_forms(
    text: str, name: str, path: str, pinned: bool
) -> None:
    assert LoraPath.parse(text) == LoraPath(lora_name=name, lora_path=path, pinned=pinned)


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", ".", "=/data/a", "sql=", "two words=/data/a", "@base=/data/a", "/lr=3/a"),
        *('{"lora_name": "sql"', '{"lora_name": "sql"}', '{"lora_name": "", "lora_path": "a"}'),
        '{"lora_name": "sql", "lora_path": "a", "rank": 8}',
        '{"lora_name": "sql", "lora_path": "a", "pinned": "perhaps"}',
    ],
)
def test_a_wrong_lora_path_is_refused_with_the_three_forms_named(text: str) -> None:
    with pytest.raises(BadInput) as error:
        LoraPath.parse(text)
    assert str(error.value).startswith(f"--lora-paths {text}: ")
    assert str(error.value).endswith(
        " Give PATH, NAME=PATH, or JSON with lora_name, lora_path and pinned, with a folder or"
        " OWNER/NAME[@REVISION] of the hub as the path; a name begins with a letter or digit and"
        " goes on with those and . _ - /"
    )


@pytest.mark.parametrize(
    ("text", "name", "repository"),
    [
        ("acme/sql", "sql", "hf:acme/sql"),
        ("acme/sql@v1", "sql", "hf:acme/sql@v1"),
        ("hf:acme/sql@v1", "sql", "hf:acme/sql@v1"),
        ("x=acme/sql@refs/pr/1", "x", "hf:acme/sql@refs/pr/1"),
        ('{"lora_name": "x", "lora_path": "acme/sql@v1"}', "x", "hf:acme/sql@v1"),
        ("x=here/sql", "x", None),
        ("x=hf:here/sql", "x", "hf:here/sql"),
        ("x=./acme/sql", "x", None),
        ("/acme/sql", "sql", None),
    ],
)
def test_a_lora_path_is_a_repository_where_no_folder_of_that_name_exists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    name: str,
    repository: str | None,
) -> None:
    (tmp_path / "here" / "sql").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lora = LoraPath.parse(text)
    assert lora.lora_name == name
    assert (lora.repository and str(lora.repository)) == repository


def test_a_lora_path_that_says_hub_and_is_none_is_refused() -> None:
    with pytest.raises(BadInput, match=r"hf:\.\./x is not hf:OWNER/NAME\[@REVISION\]"):
        LoraPath.parse("x=hf:../x")


@pytest.mark.parametrize("text", ['{"lora_name": "sql"}', "sql=", "two words=/data/a"])
def test_a_wrong_lora_path_is_not_blamed_on_a_flag_that_does_not_exist(text: str) -> None:
    with pytest.raises(BadInput) as error:
        LoraPath.parse(text)
    words = str(error.value).split()
    assert {word for word in words if word.startswith("--")} == {"--lora-paths"}


# --- The other flags ----------------------------------------------------------------------------


def lora(name: str, *, pinned: bool = False) -> str:
    return json.dumps({"lora_name": name, "lora_path": "p", "pinned": pinned})


def refusal(flags: Mapping[str, object]) -> str:
    with pytest.raises(BadInput) as error:
        WorkerConfig.from_flags({"model_path": Path("m"), "device": "cpu", **flags})
    return str(error.value)


@pytest.mark.parametrize(
    "flag",
    [
        *("max_loras_per_batch", "max_loaded_loras", "max_lora_rank", "max_running_requests"),
        *("max_total_tokens", "chunked_prefill_size", "context_length"),
    ],
)
def test_a_count_below_one_is_refused(flag: str) -> None:
    expected = f"--{flag.replace('_', '-')} 0: should be greater than or equal to 1"
    assert refusal({flag: 0}) == expected


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("device", "tpu", "--device \"tpu\": should be 'cpu' or 'cuda'"),
        ("lora_backend", "csgmv", "--lora-backend \"csgmv\": should be 'triton' or 'torch'"),
        ("load_format", "gguf", "--load-format \"gguf\": should be 'auto' or 'dummy'"),
        (
            *("dtype", "float64"),
            "--dtype \"float64\": should be 'auto', 'float32', 'float16' or 'bfloat16'",
        ),
        (
            *("lora_target_modules", ["q_proj", "query"]),
            f"--lora-target-modules q_proj query: should be 'all', or some of {MODULES} (found q",
        ),
        ("mem_fraction_static", 0.0, "--mem-fraction-static 0.0: should be greater than 0"),
        ("mem_fraction_static", 1.0, "--mem-fraction-static 1.0: should be less than 1"),
        ("mem_fraction_static", float("nan"), "--mem-fraction-static NaN: should be less"),
        ("lease_seconds", 0.5, "--lease-seconds 0.5: should be greater than or equal to 1"),
        ("lease_seconds", 1e6, "--lease-seconds 1000000.0: should be less than or equal to"),
        ("lease_seconds", float("nan"), "--lease-seconds NaN: should be less than or equal"),
        ("hub_owners", ["a/b"], "--hub-owners a/b: should be users or organizations of the hub"),
        (
            "hub_owners",
            ["hf:a"],
            "--hub-owners hf:a: should be users or organizations of the hub (found hf:a)",
        ),
        ("hub_owners", [".."], "--hub-owners ..: should be users or organizations of the hub"),
        ("queue", "two words", '--queue "two words": cannot name a queue: use up to 64 letters'),
        ("queue", "{tag}", '--queue "{tag}": cannot name a queue: use up to 64 letters'),
    ],
)
def test_a_wrong_value_is_refused_with_the_right_ones_named(
    flag: str, value: object, message: str
) -> None:
    assert refusal({flag: value}).startswith(message)


def test_a_name_given_twice_is_refused() -> None:
    assert refusal({"lora_paths": ["a=x", "b=y", "a=z"]}) == "--lora-paths: a is given twice"


def test_pinned_adapters_must_leave_a_slot_to_the_others() -> None:
    loras = [lora("a", pinned=True), lora("b", pinned=True), lora("c")]
    assert refusal({"lora_paths": loras, "max_loras_per_batch": 2}) == (
        "--lora-paths: 2 adapters are pinned; at most --max-loras-per-batch - 1 = 1 may be, so"
        " that the others find a slot"
    )


def test_as_many_pinned_adapters_as_leave_one_slot_are_accepted() -> None:
    flags = {"model_path": "m", "lora_paths": [lora("a", pinned=True)], "max_loras_per_batch": 2}
    assert WorkerConfig.from_flags(flags).lora_paths[0].pinned


@pytest.mark.parametrize("given", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"]])
def test_target_modules_stand_apart_by_spaces_or_commas(given: list[str]) -> None:
    config = WorkerConfig.from_flags({"model_path": "m", "lora_target_modules": given})
    assert config.lora_target_modules == ("q_proj", "v_proj")


def test_a_fetcher_beside_the_worker_needs_owners() -> None:
    assert refusal({"with_fetcher": True, "enable_lora": True, **LIMITS}) == (
        "--with-fetcher needs --hub-owners: whose repositories it may fetch"
    )


def test_a_fetchers_wrong_flag_is_refused_by_its_name() -> None:
    with pytest.raises(BadInput, match="--max-lora-rank 0: should be greater than or equal"):
        FetcherConfig.from_flags({"model_path": "m", "hub_owners": ["acme"], "max_lora_rank": 0})


def test_fewer_adapters_in_memory_than_in_a_batch_are_refused() -> None:
    assert refusal({"max_loaded_loras": 3, "max_loras_per_batch": 4}) == (
        "--max-loaded-loras 3 is below --max-loras-per-batch 4; a batch's adapters must all be in"
        " host memory"
    )


def test_as_many_adapters_in_memory_as_in_a_batch_are_accepted() -> None:
    flags = {"model_path": "m", "max_loaded_loras": 2, "max_loras_per_batch": 2}
    assert WorkerConfig.from_flags(flags).max_loaded_loras == 2


def test_fewer_adapters_in_memory_than_given_are_accepted() -> None:
    flags = {"max_loaded_loras": 2, "max_loras_per_batch": 1, "lora_paths": ["a=x", "b=y", "c=z"]}
    assert WorkerConfig.from_flags({"model_path": "m", **flags}).max_loaded_loras == 2


def test_adapters_that_come_later_need_limits(tmp_path: Path) -> None:
    for flags in ({"enable_lora": True}, {"lora_root": [tmp_path]}, {"hub_owners": ["acme"]}):
        assert refusal(flags) == (
            "--enable-lora, --lora-root and --hub-owners need --max-lora-rank and"
            " --lora-target-modules (names, or all) where no --lora-paths tell which adapters will"
            " be loaded"
        )
        assert WorkerConfig.from_flags({"model_path": "m", **flags, **LIMITS}).has_lora


@pytest.mark.parametrize("path", ["a" * 300, "circle/a/b"])
def test_a_path_that_no_system_can_look_up_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    assert LoraPath.parse(f"sql={path}").repository is None
    assert "there is no folder" in refusal({"lora_paths": ["a=x"], "lora_root": [Path(path)]})


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    flags = {"lora_paths": ["a=x"], "lora_root": [tmp_path, tmp_path / "gone"]}
    expected = f"--lora-root {tmp_path / 'gone'}: there is no folder of that name"
    assert refusal(flags) == expected


def test_two_sizes_of_the_cache_are_refused() -> None:
    assert refusal({"max_total_tokens": 64, "mem_fraction_static": 0.5}) == (
        "--max-total-tokens and --mem-fraction-static exclude each other"
    )


def test_the_triton_backend_is_refused_on_a_cpu() -> None:
    assert refusal({"lora_backend": "triton"}) == (
        "--lora-backend triton needs --device cuda; on a CPU it is torch"
    )


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal({"device": "cuda"}) == (
        "--device cuda: torch finds no CUDA device; leave it out, or use cpu"
    )


def test_left_out_flags_have_the_defaults_of_a_cpu() -> None:
    config = WorkerConfig.from_flags({"model_path": "m", "device": "cpu"})
    found = (config.running_limit, config.prefill_limit, config.resolved_dtype(torch.bfloat16))
    assert found == (48, 512, torch.float32)


# --- The command line ---------------------------------------------------------------------------


def test_the_parser_knows_exactly_the_documented_flags() -> None:
    actions = build_parser()._actions
    assert {flag for action in actions for flag in action.option_strings} - {
        "-h",
        "--help",
        "--version",
    } == FLAGS


def test_every_flag_is_a_setting() -> None:
    settings = {f"--{name.replace('_', '-')}" for name in WorkerConfig.model_fields}
    settings.remove("--repository")  # What --model-path stands for.
    assert settings == FLAGS


def test_parsed_flags_make_a_config() -> None:
    words = "--model-path m --lora-paths a=x b=y --max-loras-per-batch 2 --burst --device cpu"
    config = WorkerConfig.from_flags(vars(build_parser().parse_args(words.split())))
    assert config == WorkerConfig(
        model_path=Path("m"),
        lora_paths=(LoraPath(lora_name="a", lora_path="x"), LoraPath(lora_name="b", lora_path="y")),
        max_loras_per_batch=2,
        burst=True,
        device="cpu",
    )


@pytest.mark.usefixtures("capsys")
def test_an_abbreviated_flag_is_refused() -> None:
    with pytest.raises(SystemExit) as error:
        build_parser().parse_args(["--model-path", "m", "--max-lora", "4"])
    assert error.value.code == 2


def run_worker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_wrong_flag_ends_the_worker_with_status_2_and_one_line() -> None:
    ended = run_worker("--model-path", ".", "--dtype", "float64")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "worker: error: --dtype \"float64\": should be 'auto', 'float32', 'float16' or 'bfloat16'\n"
    )


def test_a_missing_model_folder_ends_the_worker_with_status_2_and_one_line(
    tmp_path: Path, redis_url: str
) -> None:
    gone = tmp_path / "gone"
    ended = run_worker("--model-path", str(gone), "--device", "cpu", "--redis-url", redis_url)
    assert (ended.returncode, ended.stdout) == (2, "")
    # Beside it only the log: one JSON object a line.
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith(f"worker: error: --model-path {gone}: ")


@pytest.mark.parametrize("command", ["worker.cli", "worker.hub.cli", "worker.webhooks.cli"])
def test_every_command_tells_its_version(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", command, "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, f"{release()}\n")


def test_help_does_not_import_torch() -> None:
    program = """if True:
        import sys
        from worker.cli import main
        sys.argv = ["worker", "--help"]
        try:
            main()
        except SystemExit as end:
            assert end.code == 0
        assert not {"torch", "transformers", "pydantic", "redis"} & sys.modules.keys()
    """
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--max-loras-per-batch" in ended.stdout
