"""What adapters go through: the scenario of SGLang's page, workers that were down, plain Redis."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from benchmarks.waiting import PATIENCE
from producer.cli import app
from producer.client import Client
from schemas.worker_state import WorkerState
from tests.end_to_end.at_work import (
    assert_answers,
    expected_tokens,
    job,
    status_of,
    succeed,
    wait_for_workers,
    wait_until,
    wait_until_running,
)
from tests.end_to_end.conftest import StartWorker
from tests.tiny_models import Oracle

Names = Mapping[str | None, str | None]


@pytest.fixture
def place(redis_url: str, queue_name: str) -> tuple[str, ...]:
    return "--redis-url", redis_url, "--queue", queue_name


def test_the_scenario_of_sglangs_page_in_batches_of_one_worker(
    place: tuple[str, ...],
    redis_url: str,
    queue_name: str,
    start_bare_worker: StartWorker,
    root: Path,
    oracle: Oracle,
) -> None:
    """Start with none; load two; run both beside the base model; load another under the name of
    one; pin the other; run three in three slots."""

    def lora(*args: str) -> None:
        outcome = CliRunner().invoke(app, ["lora", *args, *place])
        assert outcome.exit_code == 0, outcome.output

    start_bare_worker(*place)
    with Client(redis_url, queue_name) as client:
        wait_for_workers(client, 1)

        def run_in_one_batch(names: Names) -> dict[str, str | None]:
            """The revision of each; jobs that are claimed together run together."""
            client.pause()
            submission = client.submit([job(name, 40) for name in names])
            client.resume()
            client.wait(submission, timeout=120)
            results = list(client.results(submission))
            for result in results:
                assert result.token_ids == expected_tokens(oracle, names[result.lora], 40)
            num_adapters = len(names.keys() - {None})
            wait_until(lambda: worker_of(client).max_adapters_in_batch == num_adapters)
            return {result.lora: result.revision for result in results if result.lora}

        lora("load", "lora0", str(root / "lora0"))
        lora("load", "lora1", str(root / "lora1"))
        first = run_in_one_batch({None: None, "lora0": "lora0", "lora1": "lora1"})
        lora("unload", "lora0")
        assert set(worker_of(client).adapters) == {"lora1"}
        lora("load", "lora0", str(root / "lora0-again"))
        lora("pin", "lora1")
        lora("load", "lora2", str(root / "lora2"))
        last = run_in_one_batch({"lora0": "lora0-again", "lora1": "lora1", "lora2": "lora2"})
        assert last["lora0"] != first["lora0"]
        assert last["lora1"] == first["lora1"]
        assert "lora1" in worker_of(client).resident

        def is_counted() -> bool:
            told = status_of(client, "lora1")
            return (told.requests, told.output_tokens, told.pinned) == (2, 80, True)

        wait_until(is_counted)


def worker_of(client: Client) -> WorkerState:
    (worker,) = client.overview().workers
    return worker


def test_an_adapter_that_is_pinned_while_running_jobs_hold_all_slots_ends_no_worker(
    client: Client, root: Path, oracle: Oracle
) -> None:
    names = ("lora0", "lora1", "lora2")
    for name in names:
        succeed(client, client.load_adapter(name, root / name))
    running = client.submit([job(name, 200) for name in names * 4])
    wait_until_running(client, running)
    change = client.load_adapter("fourth", root / "lora0-again", pinned=True)
    beside = client.submit([job("fourth", 20) for _ in range(4)])
    succeed(client, change)
    for submission in (running, beside):
        assert client.wait(submission, timeout=120).is_complete  # type: ignore[union-attr]
        for result in client.results(submission):
            folder = "lora0-again" if result.lora == "fourth" else result.lora
            number = 20 if result.lora == "fourth" else 200
            assert result.token_ids == expected_tokens(oracle, folder, number), result.error
    assert all(w.max_adapters_in_batch <= 3 for w in client.overview().workers)
    wait_until(lambda: status_of(client, "fourth").num_resident == 2)


def ids(client: Client) -> set[str]:
    return {worker.id for worker in client.overview().workers}


def test_workers_that_were_down_follow_every_command_given_meanwhile(
    place: tuple[str, ...],
    redis_url: str,
    queue_name: str,
    start_bare_worker: StartWorker,
    root: Path,
    oracle: Oracle,
) -> None:
    with Client(redis_url, queue_name) as client:
        client.load_adapter("unloaded", root / "lora0", pinned=True)  # While nobody is there.
        client.load_adapter("unpinned", root / "lora1", pinned=True)
        for name in ("pinned", "forced", "replaced"):
            client.load_adapter(name, root / "lora2")
        killed, stopped = start_bare_worker(*place), start_bare_worker(*place)
        gone = set(wait_for_workers(client, 2))
        assert all(adapter.num_loaded == 2 for adapter in client.adapters())
        client.pause("forced")
        forced = client.submit([job("forced")])

        killed.kill()
        stopped.terminate()
        client.unload_adapter("unloaded")
        client.unpin_adapter("unpinned")
        client.pin_adapter("pinned")
        client.unload_adapter("forced", force=True)
        client.load_adapter("replaced", root / "lora0-again")
        change = client.load_adapter("new", root / "lora1")
        (failed,) = client.results(forced)
        assert failed.error
        assert failed.error.code == "adapter_unloaded"
        for _ in range(2):
            start_bare_worker(*place)
        for process, status in ((killed, -signal.SIGKILL), (stopped, 0)):
            process.join(PATIENCE)
            assert process.exitcode == status
        # The killed one is forgotten after 10 seconds.
        wait_until(lambda: len(ids(client)) == len(ids(client) - gone) == 2, "none came up")
        assert set(succeed(client, change)) == {"unpinned", "pinned", "replaced", "new"}
        assert [worker.pinned for worker in client.overview().workers] == [["pinned"]] * 2
        assert_answers(
            client,
            oracle,
            {
                None: None,
                "unpinned": "lora1",
                "pinned": "lora2",
                "replaced": "lora0-again",
                "new": "lora1",
            },
        )


@pytest.fixture
def plain(redis_url: str) -> Iterator[Callable[..., Any]]:
    """One command of Redis, as any client of any language sends it."""
    with redis.Redis.from_url(redis_url, decode_responses=True, protocol=2) as connection:
        yield connection.execute_command


def test_every_command_can_be_given_as_plain_commands_of_redis(
    client: Client, plain: Callable[..., Any], root: Path, oracle: Oracle
) -> None:
    """As docs/wire-contract.md tells it."""
    prefix = f"{{{client.queue}}}:"

    def run(script: str, *args: str) -> Any:
        code = f"from broker.scripts import script_text; print(script_text({script!r}))"
        text = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        return plain("EVALSHA", plain("SCRIPT LOAD", text.strip()), 1, prefix, *args)

    def states() -> list[dict[str, Any]]:
        workers = plain("ZRANGE", f"{prefix}workers", 0, -1)
        found = [plain("HGET", f"{prefix}worker:{worker}", "state") for worker in workers]
        return [json.loads(state) for state in found if state is not None]

    def follow(version: int) -> list[dict[str, Any]]:
        wait_until(lambda: all(state["desired_version"] >= version for state in states()))
        assert len(states()) == 2
        return states()

    for state in follow(run("set_adapter", "mine", str(root / "lora0"), "0")):
        assert len(state["adapters"]["mine"]) == 16
    assert_answers(client, oracle, {"mine": "lora0"})
    for change in ("pin", "unpin"):
        for state in follow(run("change_adapter", "mine", change)):
            assert ("mine" in state["pinned"]) == (change == "pin")
    for state in follow(run("set_adapter", "mine", "/etc", "0")):
        assert state["adapter_errors"]["mine"] == f"/etc is not below --lora-root {root}."
        assert "mine" in state["adapters"]
    follow(run("set_adapter", "mine", str(root / "lora1"), "0"))
    assert_answers(client, oracle, {"mine": "lora1"})
    counts = [state["adapter_counts"]["mine"] for state in states()]
    assert [count["loads"] for count in counts] == [2, 2]

    client.pause("mine")
    waiting = client.submit([job("mine")])
    assert run("change_adapter", "mine", "force")
    wait_until(lambda: plain("HEXISTS", f"{prefix}adapters", "mine") == 0)
    wait_until(lambda: not any("mine" in state["adapters"] for state in states()))
    (failed,) = [result.id for result in client.results(waiting)]
    assert plain("HMGET", f"{prefix}job:{failed}", "state", "error_code") == [
        *("failed", "adapter_unloaded")
    ]
    assert run("change_adapter", "mine", "drain") is None
