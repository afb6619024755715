"""Adapters loaded, replaced, pinned and unloaded while two real workers run on a real server."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from benchmarks.waiting import PATIENCE, wait_until
from producer.client import Client
from schemas.errors import BadInput, UnknownId
from tests.end_to_end.at_work import (
    answers,
    assert_answers,
    expected_tokens,
    job,
    status_of,
    succeed,
    wait_until_running,
)
from tests.tiny_models import Oracle, OracleOfEach, make_adapter

#: A config whose regular expression takes years.
ENDLESS = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "(([a-z._0-9])+)+X"}'


def test_adapters_come_change_and_go_while_jobs_run(
    client: Client, root: Path, oracle: Oracle
) -> None:
    assert_answers(client, oracle, {None: None})
    succeed(client, client.load_adapter("lora0", root / "lora0"))
    loaded = succeed(client, client.load_adapter("lora1", root / "lora1"))
    assert set(loaded) == {"lora0", "lora1"}
    assert_answers(client, oracle, {None: None, "lora0": "lora0", "lora1": "lora1"})

    assert set(succeed(client, client.unload_adapter("lora0"))) == {"lora1"}
    with pytest.raises(BadInput, match="unknown adapter 'lora0'"):
        client.submit([job("lora0")])
    again = succeed(client, client.load_adapter("lora0", root / "lora0-again"))
    assert again["lora0"] != loaded["lora0"]
    assert_answers(client, oracle, {None: None, "lora0": "lora0-again", "lora1": "lora1"})

    succeed(client, client.pin_adapter("lora1"))
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    names: dict[str | None, str | None] = {
        "lora0": "lora0-again",
        "lora1": "lora1",
        "lora2": "lora2",
    }
    assert_answers(client, oracle, {None: None, **names})
    wait_until(lambda: status_of(client, "lora1").num_resident == 2)  # With the next heartbeat.
    assert status_of(client, "lora1").pinned
    assert status_of(client, "lora1").num_loaded == 2


def test_a_replacement_lets_running_jobs_end_on_the_weights_they_began_with(
    client: Client, root: Path, oracle: Oracle
) -> None:
    succeed(client, client.load_adapter("lora0", root / "lora0"))
    before = client.submit([job("lora0", 400) for _ in range(8)])
    wait_until_running(client, before)
    succeed(client, client.load_adapter("lora0", root / "lora1"))
    assert client.status(before).counts["done"] < 8  # type: ignore[union-attr]
    assert_answers(client, oracle, {"lora0": "lora1"})
    client.wait(before, timeout=PATIENCE)
    revisions = set()
    old, new = (expected_tokens(oracle, name, 400) for name in ("lora0", "lora1"))
    for result in client.results(before):
        assert result.token_ids in (old, new)
        revisions.add((result.revision, result.token_ids == old))
    # No result of one revision has tokens of the other, nor a mixture.
    assert len({revision for revision, _ in revisions}) == len(revisions)
    assert any(is_old for _, is_old in revisions)


def test_an_adapter_with_dora_and_a_head_of_its_own_replaces_a_plain_one_by_command(
    client: Client, root: Path, model_folder: Path
) -> None:
    settings = {"use_dora": True, "modules_to_save": ["lm_head"]}
    modules = ["q_proj", "down_proj", "embed_tokens"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves embeddings along.
        make_adapter(
            model_folder, root / "whole", rank=6, seed=9, target_modules=modules, **settings
        )
    folders = {name: root / name for name in ("whole", "lora1", "lora2")}
    oracle = OracleOfEach(model_folder, folders)
    for name in ("lora1", "lora2"):
        succeed(client, client.load_adapter(name, root / name))
    assert_answers(client, oracle, {None: None, "lora1": "lora1", "lora2": "lora2"})
    succeed(client, client.load_adapter("lora1", root / "whole"))
    assert_answers(client, oracle, {None: None, "lora1": "whole", "lora2": "lora2"})
    succeed(client, client.load_adapter("lora1", root / "lora1"))
    assert_answers(client, oracle, {None: None, "lora1": "lora1", "lora2": "lora2"})


def test_a_folder_that_cannot_be_served_is_refused_by_each_worker_with_the_reason(
    client: Client, root: Path, oracle: Oracle, tmp_path: Path
) -> None:
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    for folder, reason in ((tmp_path, "is not below --lora-root"), (root, "is no PEFT adapter")):
        found = answers(client, client.load_adapter("bad", folder))
        assert not any(answer.success for answer in found)
        assert all(reason in (answer.error_message or "") for answer in found)
        assert all(set(answer.loaded_adapters) == {"lora2"} for answer in found)
    assert_answers(client, oracle, {None: None, "lora2": "lora2"})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b'{"peft_type":"\\ud800"}', "half of a character"),
        (b"[" * 200_000, "nested too deeply"),
        (ENDLESS, "takes too long to match"),
        (None, "is no regular file"),
    ],
    ids=["half of a character", "nested deeply", "an endless pattern", "a pipe"],
)
def test_a_config_that_breaks_its_readers_ends_no_worker_and_stops_no_other_adapter(
    client: Client, root: Path, oracle: Oracle, config: bytes | None, reason: str
) -> None:
    path = root / "breaks" / "adapter_config.json"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if config is None:
        os.mkfifo(path)
    else:
        path.write_bytes(config)
    before = {worker.id for worker in client.overview().workers}
    found = answers(client, client.load_adapter("bad", path.parent))
    assert all(reason in (answer.error_message or "") for answer in found)
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    assert_answers(client, oracle, {None: None, "lora2": "lora2"})
    assert {worker.id for worker in client.overview().workers} == before


def test_pins_beyond_the_limit_and_unknown_names_are_refused_at_once(
    client: Client, root: Path
) -> None:
    for name in ("lora0", "lora1"):
        succeed(client, client.load_adapter(name, root / name, pinned=True))
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    with pytest.raises(BadInput, match="2"):
        client.pin_adapter("lora2")
    succeed(client, client.unpin_adapter("lora0"))
    succeed(client, client.pin_adapter("lora2"))
    succeed(client, client.pin_adapter("lora2"))
    with pytest.raises(UnknownId, match="lora9"):
        client.unload_adapter("lora9")


def test_unload_finishes_what_waits_or_by_force_fails_it(client: Client, root: Path) -> None:
    succeed(client, client.load_adapter("lora1", root / "lora1"))
    drained = client.submit([job("lora1", 20) for _ in range(150)])
    assert succeed(client, client.unload_adapter("lora1")) == {}
    assert client.status(drained).counts["done"] == 150  # type: ignore[union-attr]

    succeed(client, client.load_adapter("lora1", root / "lora1"))
    forced = client.submit([job("lora1", 100) for _ in range(300)])
    assert succeed(client, client.unload_adapter("lora1", force=True)) == {}
    counts = client.wait(forced, timeout=PATIENCE).counts  # type: ignore[union-attr]
    assert counts["done"] + counts["failed"] == 300
    assert counts["failed"] > 0
    codes = {result.error.code for result in client.results(forced) if result.error}
    assert codes == {"adapter_unloaded"}
