"""A base model is a folder, or a repository on a hub on this machine, with a real cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file
from structlog.testing import capture_logs
from transformers import LlamaForCausalLM

from schemas.errors import BadInput
from tests.fake_hub import FakeHub, Repository
from tests.tiny_models import make_llama
from worker import model_place
from worker.hub.failures import HubUnavailable
from worker.hub.repository import HubRepository
from worker.model.config import ModelConfig
from worker.model_place import ModelPlace, find_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in two shards, with what else repositories hold."""
    folder = make_llama(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors"):
        (folder / name).write_text("not wanted")
    return folder


def found(model_path: str) -> ModelPlace:
    place = find_model(model_path)
    place.fetch_weights()
    return place


def refusal(model_path: str) -> str:
    with pytest.raises(BadInput) as error:
        found(model_path)
    return str(error.value)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- Folder or repository -----------------------------------------------------------------------


def test_a_folder_of_that_name_wins_and_the_prefix_means_the_repository(
    hub: FakeHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/tiny", model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert found("acme/tiny") == ModelPlace(Path("acme/tiny"))
    assert hub.requests == []
    place = found("hf:acme/tiny")
    assert place.repository == "acme/tiny"
    assert (place.folder / "config.json").exists()


def test_config_tokenizer_and_weights_are_taken_and_nothing_else(hub: FakeHub, model: Path) -> None:
    commit = hub.push("acme/tiny", model)
    folder = found("acme/tiny").folder
    assert folder.name == commit
    unwanted = {"pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors"}
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in model.iterdir()} - unwanted
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert load_file(folder / name).keys() == load_file(model / name).keys()
    assert ModelConfig.from_folder(folder).num_layers == 3


def test_of_weights_in_several_forms_one_is_taken(hub: FakeHub, model: Path) -> None:
    for other in (
        "model.safetensors",
        "model.fp16.safetensors",
        "model.safetensors.index.fp16.json",
    ):
        shutil.copy(model / "model-00001-of-00003.safetensors", model / other)
    hub.push("acme/tiny", model)
    folder = found("acme/tiny").folder
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert [name for name in hub.downloads() if name.startswith("model")] == ["model.safetensors"]


def test_files_of_folders_in_the_repository_are_left_there(hub: FakeHub, model: Path) -> None:
    commit = hub.push("acme/tiny", model)
    files = hub.repositories["acme/tiny"].commits[commit]
    files |= {"model_old/x.safetensors": b"", "model-1/model-00004-of-00004.safetensors": b""}
    assert {path.name for path in found("acme/tiny").folder.glob("*model*")} == {
        path.name for path in model.glob("model*")
    } - {"modeling.py"}


def test_weights_come_later_and_of_the_same_commit(hub: FakeHub, model: Path) -> None:
    hub.push("acme/tiny", model)
    place = find_model("acme/tiny")
    assert (place.folder / "tokenizer.json").exists()
    assert list(place.folder.glob("model*")) == []
    hub.push("acme/tiny", model)
    place.fetch_weights()
    assert (place.folder / "model.safetensors.index.json").exists()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, model: Path) -> None:
    first = hub.push("acme/tiny", model, "v1")
    hub.push("acme/tiny", model)
    for revision in ("v1", first):
        place = found(f"acme/tiny@{revision}")
        assert (place.folder.name, place.repository) == (first, "acme/tiny")


def test_what_the_cache_has_is_enough_offline_and_is_not_downloaded_again(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/tiny", model)
    place = found("acme/tiny")
    hub.requests.clear()
    assert found("acme/tiny") == place
    assert [line for line in hub.requests if "resolve" in line] == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert found("acme/tiny") == place
    go_offline(monkeypatch)
    assert found("acme/tiny") == place


def test_a_start_asks_the_hub_and_tells_of_it_once(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/tiny", model)
    found("acme/tiny")
    hub.requests.clear()
    with capture_logs() as logs:
        found("acme/tiny")
    assert [line["event"] for line in logs] == ["model_found"]
    assert len(hub.requests) == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with capture_logs() as logs:
        found("acme/tiny")
    assert [line["event"] for line in logs] == ["hub_unavailable", "model_found"]


def test_a_shard_that_is_not_what_was_announced_is_deleted_and_loaded_anew(
    hub: FakeHub, model: Path
) -> None:
    hub.push("acme/tiny", model)
    hub.corrupt_downloads = 1
    with pytest.raises(HubUnavailable, match=r"safetensors is not what the hub announced"):
        found("acme/tiny")
    folder = found("acme/tiny").folder
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (model / path.name).read_bytes()


class Killed(BaseException):
    """Ends a process where it stands."""


def test_what_a_killed_process_has_not_checked_is_checked_by_the_next(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/tiny", model)
    hub.corrupt_downloads = 1

    def killed(self: HubRepository, path: Path) -> None:
        if path.suffix == ".safetensors":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(HubRepository, "_check_content", killed)
        with pytest.raises(Killed):
            found("acme/tiny")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubUnavailable, match="the download from"):
            found("acme/tiny")
    with pytest.raises(HubUnavailable, match=r"00001-of-00003\.safetensors is not what the hub"):
        found("acme/tiny")
    folder = found("acme/tiny").folder
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (model / path.name).read_bytes()


@pytest.mark.parametrize(
    "missing",
    ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
)
def test_a_download_that_was_broken_off_is_not_taken_for_the_model(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    hub.push("acme/tiny", model)
    folder = found("acme/tiny").folder
    for path in folder.glob(missing):
        path.unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable, match=r"the download from http://127\.0\.0\.1:9 failed"):
        found("acme/tiny")


def test_a_long_download_is_told_in_the_log(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_place, "_TOLD_EVERY", 0.0)
    hub.push("acme/tiny", model)
    with capture_logs() as logs:
        found("acme/tiny")
    told = [line for line in logs if line["event"] == "model_downloading"]
    assert told
    assert all(line["repository"].startswith("hf:acme/tiny") for line in told)


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ((404, "RepoNotFound"), "has no such repository, or it is private and needs a token"),
        ((401, "RepoNotFound"), "has no such repository, or it is private and needs a token"),
        ((403, "GatedRepo"), "the repository is gated. Accept its terms on the hub"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_remedy(
    hub: FakeHub, error: tuple[int, str], reason: str
) -> None:
    hub.repositories["acme/tiny"] = Repository(error=error)
    told = refusal("acme/tiny")
    assert told.startswith(
        "--model-path acme/tiny: there is no folder of that name; hf:acme/tiny: "
    )
    assert reason in told
    assert refusal("hf:acme/tiny").startswith("--model-path hf:acme/tiny: the ")


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (["config.json"], "hf:acme/tiny is no model: it lacks config.json."),
        (["*.safetensors", "*.index.json"], "pytorch_model.bin is a pickle, .* never loaded"),
        (
            ["*.index.json"],
            "neither model.safetensors nor shards of it with model.safetensors.index",
        ),
        (["model-*.safetensors"], "neither model.safetensors nor shards of it with model.safetens"),
        (["model-00002-*.safetensors"], "holds 2 shards of 3."),
    ],
)
def test_a_repository_without_a_model_is_refused_before_weights_are_downloaded(
    hub: FakeHub, model: Path, missing: list[str], reason: str
) -> None:
    for pattern in missing:
        for path in model.glob(pattern):
            path.unlink()
    hub.push("acme/tiny", model)
    with pytest.raises(BadInput, match=reason):
        found("acme/tiny")
    assert not [line for line in hub.requests if "safetensors" in line]


def test_weights_in_half_precision_alone_are_refused_before_they_are_downloaded(
    hub: FakeHub, model: Path
) -> None:
    for path in model.glob("model*.safetensors*"):
        path.unlink()
    (model / "model.fp16.safetensors").write_bytes(b"")
    hub.push("acme/tiny", model)
    assert "hf:acme/tiny" in refusal("acme/tiny")
    assert "model.fp16.safetensors" not in hub.downloads()


def test_an_unknown_revision_and_an_empty_cache_offline_are_told(
    hub: FakeHub, cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/tiny", model)
    assert "the repository has no revision 'v9'" in refusal("acme/tiny@v9")
    find_model("acme/tiny")
    go_offline(monkeypatch)
    with pytest.raises(BadInput, match=r"is not in the hub cache"):
        find_model("acme/tiny").fetch_weights()
    shutil.rmtree(cache)
    assert refusal("hf:acme/tiny") == (
        f"--model-path hf:acme/tiny is not in the hub cache {cache} of this machine and"
        " HF_HUB_OFFLINE forbids to ask the hub. Start once where the hub can be asked, or name a"
        " cache that has it by HF_HOME."
    )


def test_what_cannot_be_a_repository_is_a_folder_that_does_not_exist() -> None:
    assert refusal("llama") == (
        "--model-path llama: there is no folder of that name; a repository of the hub is named"
        " OWNER/NAME[@REVISION]."
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model-path", "/gone/llama"], "--model-path /gone/llama: there is no folder"),
        (["--model-path", "acme/tiny"], "--model-path acme/tiny: there is no folder"),
        (["--model-path", ".", "--lora-paths", "a=/gone"], "--lora-paths a: there is no folder"),
    ],
)
def test_a_mistyped_name_is_told_before_torch_is_imported(flags: list[str], told: str) -> None:
    program = f"""if True:
        import sys
        from worker.cli import _run, build_parser
        from worker.command import run_command
        try:
            run_command("worker", lambda: _run(vars(build_parser().parse_args({flags!r}))))
        except SystemExit as end:
            assert end.code == 2
        assert not {{"torch", "transformers", "redis"}} & sys.modules.keys()
    """
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/gone"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith(f"worker: error: {told}")
