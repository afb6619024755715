"""The ``lora`` commands against real workers, while they run, come and go, and the server too."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from benchmarks.waiting import PATIENCE, wait_until
from broker.embedded import EmbeddedServer
from producer.cli import app
from producer.client import Client
from tests.end_to_end.at_work import (
    answers,
    assert_answers,
    expected_tokens,
    job,
    status_of,
    succeed,
    wait_for_workers,
    wait_until_running,
)
from tests.end_to_end.conftest import StartWorker
from tests.tiny_models import Oracle


def lora(redis_url: str, client: Client, *args: str) -> Outcome:
    """A command as it is typed."""
    place = ("--redis-url", redis_url, "--queue", client.queue, "--json")
    return CliRunner().invoke(app, ["lora", *args, *place])


def test_every_command_may_be_given_twice(
    client: Client, redis_url: str, root: Path, oracle: Oracle
) -> None:
    def both_succeed(*args: str) -> list[dict[str, str]]:
        found = []
        for _ in range(2):
            outcome = lora(redis_url, client, *args)
            assert outcome.exit_code == 0, outcome.output
            workers = json.loads(outcome.stdout)["workers"]
            assert [worker["success"] for worker in workers] == [True, True]
            found += [worker["loaded_adapters"] for worker in workers]
        assert all(adapters == found[0] for adapters in found)
        return found

    both_succeed("load", "twice", str(root / "lora0"))
    assert status_of(client, "twice").loads == 2, "each worker has read it once"
    for command in ("pin", "unpin"):
        both_succeed(command, "twice")
        assert status_of(client, "twice").pinned == (command == "pin")
    assert_answers(client, oracle, {None: None, "twice": "lora0"})
    assert lora(redis_url, client, "unload", "twice").exit_code == 0
    assert lora(redis_url, client, "unload", "twice").exit_code == 3


def test_the_list_tells_where_two_workers_have_each_adapter_and_what_it_has_done(
    client: Client, redis_url: str, root: Path, oracle: Oracle
) -> None:
    succeed(client, client.load_adapter("lora0", root / "lora0", pinned=True))
    succeed(client, client.load_adapter("lora1", root / "lora1"))
    assert not any(a.success for a in answers(client, client.load_adapter("gone", root / "gone")))
    assert_answers(client, oracle, {"lora0": "lora0"})

    def listed(*flags: str) -> str:
        place = ("--redis-url", redis_url, "--queue", client.queue)
        outcome = CliRunner().invoke(app, ["lora", "list", *flags, *place])
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    def counts(name: str) -> list[str]:
        return next(row.split() for row in listed().splitlines()[5:] if row.startswith(name))

    # Each worker has it in a slot, and tells of the jobs with its next heartbeat.
    wait_until(lambda: counts("lora0")[1:4] + counts("lora0")[6:] == ["3", "36", "2", "2", "0"])
    head, gone, lora0, lora1, *_ = listed().splitlines()
    assert head.split() == ["name", "source", "revision", "state", "waiting"]
    assert "loaded on 0 of 2 workers, failed on 2" in gone
    assert "loaded on 2 of 2 workers (in a slot), pinned  " in lora0
    assert "loaded on 2 of 2 workers (in memory)  " in lora1
    assert f": there is no folder {root / 'gone'}." in listed()
    found = {row["name"]: row for row in json.loads(listed("--json"))["adapters"]}
    assert [found["lora0"][f"num_{what}"] for what in ("loaded", "resident", "pinned")] == [2] * 3
    assert found["lora1"]["slot_loads"] == 0


@pytest.mark.parametrize("command", ["unload", "pin", "unpin"])
def test_an_unknown_name_changes_nothing(
    client: Client, redis_url: str, root: Path, command: str
) -> None:
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    outcome = lora(redis_url, client, command, "lora3")
    assert outcome.exit_code == 3
    assert "did you mean 'lora2'?" in outcome.stderr
    assert status_of(client, "lora2").num_loaded == 2


def test_a_pin_beyond_the_limit_is_refused_and_the_base_model_and_others_are_served_beside(
    client: Client, redis_url: str, root: Path, oracle: Oracle
) -> None:
    for name in ("lora0", "lora1"):
        succeed(client, client.load_adapter(name, root / name, pinned=True))
    outcome = lora(redis_url, client, "load", "lora2", str(root / "lora2"), "--pin")
    assert outcome.exit_code == 2
    assert "can keep 2 adapters pinned" in outcome.stderr
    succeed(client, client.load_adapter("lora2", root / "lora2"))
    assert_answers(client, oracle, {None: None, **{n: n for n in ("lora0", "lora1", "lora2")}})


def test_a_replacement_that_cannot_be_read_leaves_the_old_weights_in_service(
    client: Client, redis_url: str, root: Path, oracle: Oracle, tmp_path: Path
) -> None:
    before = succeed(client, client.load_adapter("lora0", root / "lora0"))
    cut_off = root / "cut-off"
    shutil.copytree(root / "lora1", cut_off)
    weights = cut_off / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    outcome = lora(redis_url, client, "load", "lora0", str(cut_off))
    assert outcome.exit_code == 1
    assert f"revision {before['lora0']}, is served as before" in outcome.stderr
    for worker in json.loads(outcome.stdout)["workers"]:
        assert f"{weights}: is damaged or not completely copied" in worker["error_message"]
        assert worker["loaded_adapters"] == before
    assert_answers(client, oracle, {"lora0": "lora0"})

    weights.write_bytes(whole)
    after = succeed(client, client.load_adapter("lora0", cut_off))
    assert after["lora0"] != before["lora0"]
    assert_answers(client, oracle, {"lora0": "lora1"})
    shutil.rmtree(cut_off)


def test_commands_that_race_a_running_batch_do_not_change_its_answers(
    client: Client, root: Path, oracle: Oracle
) -> None:
    succeed(client, client.load_adapter("lora0", root / "lora0"))
    running = client.submit([job(name, 300) for name in (None, "lora0") * 8])
    wait_until_running(client, running)
    num_rounds = 0
    while not client.status(running).is_complete and num_rounds < 20:  # type: ignore[union-attr]
        for name in ("lora1", "lora2"):
            client.load_adapter(name, root / name, pinned=True)
            client.unpin_adapter(name)
        client.load_adapter("lora0", root / "lora0")
        for name in ("lora1", "lora2"):
            # Not `succeed`: what else each worker has just then may differ.
            assert all(answer.success for answer in answers(client, client.unload_adapter(name)))
        num_rounds += 1
    assert num_rounds > 1
    client.wait(running, timeout=PATIENCE)
    for result in client.results(running):
        assert result.token_ids == expected_tokens(oracle, result.lora, 300)
    assert {name for worker in client.overview().workers for name in worker.adapters} == {"lora0"}


def test_each_command_given_while_a_worker_is_stopped_is_answered_for_itself(
    redis_url: str, queue_name: str, start_bare_worker: StartWorker, root: Path
) -> None:
    process = start_bare_worker("--redis-url", redis_url, "--queue", queue_name)
    assert process.pid
    with Client(redis_url, queue_name) as client:
        wait_for_workers(client, 1)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            changes = [client.load_adapter("sql", root / name) for name in ("gone", "lora0")]
        finally:
            os.kill(process.pid, signal.SIGCONT)
        (first,), (second,) = (answers(client, change, workers=1) for change in changes)
        assert (first.success, first.error_message) == (False, "it was loaded again meanwhile")
        assert second.success
        (failed,) = answers(client, client.load_adapter("sql", root / "gone"), workers=1)
        assert not failed.success
        succeed(client, client.pin_adapter("sql"), workers=1)
        assert not answers(client, client.load_adapter("sql", root / "gone"), workers=1)[0].success
        assert client.overview().workers[0].pinned == ["sql"]
        status = status_of(client, "sql")
        assert (status.pinned, status.num_pinned) == (True, 1)


@pytest.fixture
def server_folder() -> Iterator[Path]:
    # Not tmp_path: the path of a Unix socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="lorry-"))
    yield folder
    shutil.rmtree(folder)


def test_a_server_that_is_restarted_between_commands_knows_them_or_is_told_them_again(
    server_folder: Path, start_bare_worker: StartWorker, root: Path, oracle: Oracle
) -> None:
    with ExitStack() as stack:

        def restart() -> str:
            stack.close()
            return stack.enter_context(EmbeddedServer(server_folder)).url

        url = restart()
        with Client(url) as client:
            for _ in range(2):
                start_bare_worker("--redis-url", url)
            wait_for_workers(client, 2)
            succeed(client, client.load_adapter("lora0", root / "lora0", pinned=True))

            restart()
            assert status_of(client, "lora0").pinned
            for change in (client.unpin_adapter, client.pin_adapter):
                assert set(succeed(client, change("lora0"))) == {"lora0"}
            assert set(succeed(client, client.load_adapter("lora1", root / "lora1"))) == {
                *("lora0", "lora1")
            }
            assert_answers(client, oracle, {None: None, "lora0": "lora0", "lora1": "lora1"})

            stack.close()
            shutil.rmtree(server_folder / "appendonlydir")
            restart()
            assert client.overview().num_submissions == 0
            wait_for_workers(client, 2)
            wait_until(lambda: [a.num_loaded for a in client.adapters()] == [2, 2])
            assert status_of(client, "lora0").pinned
            assert set(succeed(client, client.load_adapter("lora2", root / "lora2"))) == {
                *("lora0", "lora1", "lora2")
            }
            names: dict[str | None, str | None] = {n: n for n in ("lora0", "lora1", "lora2")}
            assert_answers(client, oracle, {None: None, **names})
            assert set(succeed(client, client.unload_adapter("lora0"))) == {"lora1", "lora2"}


def test_an_evicted_adapter_comes_back_as_the_same_revision_or_not_at_all(
    redis_url: str,
    queue_name: str,
    start_bare_worker: StartWorker,
    root: Path,
    oracle: Oracle,
) -> None:
    flags = ("--max-loras-per-batch", "1", "--max-loaded-loras", "1")
    start_bare_worker(*flags, "--redis-url", redis_url, "--queue", queue_name)
    folder = root / "in-place"
    shutil.copytree(root / "lora0", folder)
    with Client(redis_url, queue_name) as client:
        wait_for_workers(client, 1)
        loaded = succeed(client, client.load_adapter("mine", folder), workers=1)
        succeed(client, client.load_adapter("lora1", root / "lora1"), workers=1)
        for name in ("mine", "lora1"):
            assert_answers(client, oracle, {name: name.replace("mine", "lora0")})
        wait_until(lambda: status_of(client, "mine").evictions == 2)  # With the next heartbeat.
        wait_until(lambda: status_of(client, "mine").slot_evictions == 1)
        found = status_of(client, "mine")
        assert (found.loads, found.slot_loads) == (2, 1)
        assert (found.num_loaded, found.num_in_memory, found.num_resident) == (1, 0, 0)
        assert status_of(client, "mine").revision == loaded["mine"]

        shutil.rmtree(folder)
        shutil.copytree(root / "lora2", folder)
        submission = client.submit([job("mine"), job("lora1"), job(None)])
        client.wait(submission, timeout=PATIENCE)
        refused, *others = client.results(submission)
        assert refused.error
        assert refused.error.code == "adapter_unavailable"
        assert f"than when it was loaded ({loaded['mine']}); load it again" in refused.error.message
        assert [result.status for result in others] == ["done", "done"]

        again = succeed(client, client.load_adapter("mine", folder), workers=1)
        assert again["mine"] != loaded["mine"]
        assert_answers(client, oracle, {"mine": "lora2"})
    shutil.rmtree(folder)
