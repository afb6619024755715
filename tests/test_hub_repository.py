"""Downloads from a hub on this machine into a real cache of huggingface_hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir
from structlog.testing import capture_logs

from schemas.errors import BadInput
from schemas.hub import HubSource
from tests.fake_hub import FakeHub, Repository, commit_of
from worker.hub import repository
from worker.hub.failures import HubUnavailable
from worker.hub.repository import HubRepository

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with files as an adapter has them."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "training.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("An adapter")
    return folder


def at(text: str) -> HubRepository:
    source = HubSource.parse(text)
    assert source
    return HubRepository(source)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- Success ------------------------------------------------------------------------------------


def test_config_and_weights_come_into_the_cache_and_nothing_else(
    hub: FakeHub, cache: Path, adapter: Path
) -> None:
    commit = hub.push("acme/sql", adapter)
    source, folder = at("acme/sql").download()
    assert str(source) == f"hf:acme/sql@{commit}"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    (repo,) = scan_cache_dir(cache).repos
    assert repo.repo_id == "acme/sql"
    assert {revision.commit_hash for revision in repo.revisions} == {commit}


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", commit_of(1)])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: FakeHub, adapter: Path, revision: str
) -> None:
    first = hub.push("acme/sql", adapter, "v1", "refs/pr/1")
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS[::-1])
    hub.push("acme/sql", adapter)
    source, folder = at(f"acme/sql@{revision}").download()
    assert source.revision == first
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_what_the_cache_has_is_not_downloaded_again(hub: FakeHub, adapter: Path) -> None:
    hub.push("acme/sql", adapter)
    at("acme/sql").download()
    hub.requests.clear()
    told: list[tuple[int, int]] = []
    at("acme/sql").download(lambda done, total: told.append((done, total)))
    assert [line for line in hub.requests if "resolve" in line] == []
    assert told[-1][0] == told[-1][1] > len(WEIGHTS)


def test_a_download_tells_its_bytes(hub: FakeHub, adapter: Path) -> None:
    hub.push("acme/sql", adapter)
    told: list[tuple[int, int]] = []
    at("acme/sql").download(lambda done, total: told.append((done, total)))
    total = len(WEIGHTS) + len((adapter / "adapter_config.json").read_bytes())
    assert {size for _, size in told} == {total}
    done = [size for size, _ in told]
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(done)


def test_the_token_of_the_environment_is_sent(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.push("acme/sql", adapter)
    at("acme/sql").download()
    assert hub.tokens == {"Bearer hf_secret"}


# --- Failures that stay -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ((401, "RepoNotFound"), "has no such repository, or it is private and needs a token"),
        ((404, "RepoNotFound"), "has no such repository, or it is private and needs a token"),
        ((401, ""), "has no such repository, or it is private and needs a token"),
        ((403, "GatedRepo"), "the repository is gated. Accept its terms on the hub"),
        ((400, ""), "the hub refused the request"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_remedy(
    hub: FakeHub, error: tuple[int, str], reason: str
) -> None:
    hub.repositories["acme/sql"] = Repository(error=error)
    with pytest.raises(BadInput, match=f"hf:acme/sql: .*{reason}"):
        at("acme/sql").download()


def test_an_unknown_repository_and_an_unknown_revision_are_told(
    hub: FakeHub, adapter: Path
) -> None:
    hub.push("acme/sql", adapter)
    with pytest.raises(BadInput, match=r"hf:acme/sqll: .*no such repository"):
        at("acme/sqll").download()
    with pytest.raises(BadInput, match="hf:acme/sql@v9: the repository has no revision 'v9'"):
        at("acme/sql@v9").download()


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("adapter_config.json", "is no PEFT adapter: it lacks adapter_config.json"),
        ("adapter_model.safetensors", r"training.bin is a pickle, .* never loaded"),
    ],
)
def test_a_repository_without_an_adapter_is_refused_before_anything_is_downloaded(
    hub: FakeHub, adapter: Path, missing: str, reason: str
) -> None:
    (adapter / missing).unlink()
    hub.push("acme/sql", adapter)
    with pytest.raises(BadInput, match=reason):
        at("acme/sql").download()
    assert len(hub.requests) == 1


@pytest.mark.parametrize("answered", ["", "v1", "0" * 39])
def test_a_hub_that_names_no_commit_may_do_so_later(
    hub: FakeHub, adapter: Path, answered: str
) -> None:
    commit = hub.push("acme/sql", adapter)
    repository = hub.repositories["acme/sql"]
    repository.commits[answered] = repository.commits.pop(commit)
    repository.refs["main"] = answered
    with pytest.raises(HubUnavailable, match=r"^hf:acme/sql: the hub names no commit\.$"):
        at("acme/sql").download()
    assert not any("resolve" in line for line in hub.requests)


def test_a_cache_that_cannot_be_written_is_told_with_the_remedy(
    hub: FakeHub, cache: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("acme/sql", adapter)

    def read_only(*_: object, **__: object) -> str:
        raise OSError(30, "Read-only file system", str(cache))

    monkeypatch.setattr(repository, "hf_hub_download", read_only)
    with pytest.raises(BadInput, match="the hub cache cannot be written: Read-only file system"):
        at("acme/sql").download()


def test_a_full_disk_may_pass(hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("acme/sql", adapter)

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "hf_hub_download", full)
    with pytest.raises(HubUnavailable, match=r"the disk of the hub cache .* is full"):
        at("acme/sql").download()


# --- Failures that may pass ---------------------------------------------------------------------


def test_a_connection_that_is_cut_is_taken_up_where_it_ended(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.push("acme/sql", adapter)
    hub.cut_downloads = 1
    _, folder = at("acme/sql").download()
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == [f"bytes={len(WEIGHTS) // 2}-"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_may_pass(hub: FakeHub, adapter: Path, status: int) -> None:
    hub.push("acme/sql", adapter)
    hub.failures = [status]
    with pytest.raises(HubUnavailable, match=f"hf:acme/sql: the download .* failed: .*{status}"):
        at("acme/sql").download()
    at("acme/sql").download()


def test_no_hub_at_all_may_pass(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable, match=r"the download from http://127\.0\.0\.1:9 failed"):
        at("acme/sql").download()


def test_what_an_operator_named_is_taken_from_the_cache_while_the_hub_is_unavailable(
    hub: FakeHub, adapter: Path
) -> None:
    commit = hub.push("acme/sql", adapter)
    hub.failures = [503]
    with pytest.raises(HubUnavailable, match="503"):
        at("acme/sql").download_or_find()  # The cache has nothing yet.
    assert at("acme/sql").download_or_find()[0].revision == commit
    hub.failures = [503]
    with capture_logs() as logs:
        source, folder = at("acme/sql").download_or_find()
    assert source.revision == commit
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    (told,) = logs
    assert (told["event"], told["used"]) == ("hub_unavailable", f"hf:acme/sql@{commit}")


def test_content_that_is_not_what_was_announced_is_deleted_and_loaded_anew(
    hub: FakeHub, adapter: Path
) -> None:
    hub.push("acme/sql", adapter)
    hub.corrupt_downloads = 1
    with pytest.raises(HubUnavailable, match=r"adapter_model\.safetensors is not what the hub"):
        at("acme/sql").download()
    _, folder = at("acme/sql").download()
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_a_cached_file_that_was_changed_is_deleted_and_loaded_anew(
    hub: FakeHub, adapter: Path
) -> None:
    hub.push("acme/sql", adapter)
    _, folder = at("acme/sql").download()
    (folder / "adapter_config.json").resolve().write_text("{}")
    with pytest.raises(HubUnavailable, match=r"adapter_config\.json is not what the hub"):
        at("acme/sql").download()
    _, folder = at("acme/sql").download()
    assert "LORA" in (folder / "adapter_config.json").read_text()


def test_what_killed_downloads_left_is_deleted(hub: FakeHub, cache: Path, adapter: Path) -> None:
    hub.push("acme/sql", adapter)
    blobs = cache / "models--acme--sql" / "blobs"
    blobs.mkdir(parents=True)
    dead, alive = blobs / "a.1.incomplete", blobs / "a.2.incomplete"
    for path in (dead, alive):
        path.write_bytes(b"half")
    os.utime(dead, (0, 0))
    at("acme/sql").download()
    assert (dead.exists(), alive.exists()) == (False, True)


# --- Offline, and what workers may read ---------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{commit_of(1)}"])
def test_offline_the_cache_is_enough(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    commit = hub.push("acme/sql", adapter, "v1")
    at("acme/sql").download()
    at("acme/sql@v1").download()
    go_offline(monkeypatch)
    hub.requests.clear()
    source, folder = at(f"acme/sql{revision}").download()
    assert source.revision == commit
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert hub.requests == []


@pytest.mark.parametrize("text", ["acme/sql", "acme/sql@v1", f"acme/sql@{commit_of(1)}"])
def test_offline_an_empty_cache_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    go_offline(monkeypatch)
    with pytest.raises(BadInput, match=f"hf:{text} is not in the hub cache .* HF_HUB_OFFLINE"):
        at(text).download()


def test_offline_what_the_cache_has_in_place_of_the_weights_is_told(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has cached the adapter, which knows pickles."""
    commit = hub.push("acme/sql", adapter)
    _, folder = at("acme/sql").download()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    go_offline(monkeypatch)
    with pytest.raises(BadInput) as error:
        at("acme/sql").download()
    assert (
        f": hf:acme/sql@{commit} lacks adapter_model.safetensors. adapter_model.bin is a pickle,"
        in str(error.value)
    )
    assert "hf:acme/sql is not in the hub cache" in str(error.value)


def test_a_folder_is_found_by_its_commit_alone(hub: FakeHub, cache: Path, adapter: Path) -> None:
    commit = hub.push("acme/sql", adapter)
    _, folder = at("acme/sql").download()
    assert at(f"acme/sql@{commit}").folder() == folder
    for text in ("acme/sql", "acme/sql@main", f"acme/sql@{commit_of(9)}", f"acme/x@{commit}"):
        with pytest.raises(BadInput, match="is not in the hub cache"):
            at(text).folder()


@pytest.mark.parametrize("linked", ["adapter_model.safetensors", "adapter_config.json", "."])
def test_a_link_that_leaves_the_cache_is_not_followed(
    hub: FakeHub, cache: Path, adapter: Path, tmp_path: Path, linked: str
) -> None:
    commit = hub.push("acme/sql", adapter)
    _, folder = at("acme/sql").download()
    if linked == ".":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder / linked).unlink()
        (folder / linked).symlink_to(adapter / linked)
    with pytest.raises(BadInput, match="leads out of the hub cache"):
        at(f"acme/sql@{commit}").folder()


def test_a_note_in_the_cache_that_is_no_commit_is_not_followed(
    hub: FakeHub, cache: Path, adapter: Path
) -> None:
    hub.push("acme/sql", adapter)
    at("acme/sql").download()
    (cache / "models--acme--sql" / "refs" / "main").write_text("../../../etc")
    with pytest.raises(BadInput, match="is not in the hub cache"):
        at("acme/sql").find_cached()
