"""The soak: its plan follows from its seed, and it fails if it finds that a promise was broken."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fault_bench
from benchmarks.ledger import Ledger
from benchmarks.soak import __main__ as command
from benchmarks.soak import recoveries, report
from benchmarks.soak.outcomes import wrong_outcomes
from benchmarks.soak.plan import (
    COMMANDS,
    FLUSH,
    OTHER_FAULTS,
    WORKER_FAULTS,
    Command,
    Fault,
    Submission,
    make_plan,
)
from benchmarks.soak.player import run
from broker.claims import ClaimRequest
from broker.job_queue import JobQueue
from schemas.job import Job
from schemas.result import ErrorInfo, Result, Timings


def test_a_plan_follows_from_its_seed() -> None:
    assert make_plan(5, 60) == make_plan(5, 60)
    assert make_plan(5, 60) != make_plan(6, 60)


def test_ten_minutes_hold_every_fault_and_every_command() -> None:
    plan = make_plan(1, 600)
    faults = [event.kind for event in plan if isinstance(event, Fault)]
    assert set(faults) == {*WORKER_FAULTS, *OTHER_FAULTS, FLUSH}
    assert faults.count(FLUSH) == 2
    assert {event.kind for event in plan if isinstance(event, Command)} == {*COMMANDS}


def job(**fields: Any) -> dict[str, Any]:
    return {"id": "job-0", "prompt": "x", "lora": "a", "metadata": {"fault": None}} | fields


def result(**fields: Any) -> Result:
    known: dict[str, Any] = {"id": "job-0", "submission": "s", "lora": "a", "status": "done"}
    known |= {"revision": "a", "timings": Timings(queued=1.0), "metadata": {"fault": None}}
    return Result(**known | fields)


def failed(code: str, status: str = "failed") -> Result:
    return result(status=status, error=ErrorInfo(code=code, message="m"), revision=None)


BAD = {"fault": {"at": "read", "do": "fail"}}


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        (job(), result()),
        (job(lora=None), result(revision=None)),
        (job(lora="c"), result(revision="c-7")),
        (job(metadata=BAD), failed("bad_prompt")),
        (job(lora="c"), failed("adapter_unloaded")),
        (job(), failed("attempts_exhausted", "dead")),
        (job(), failed("cancelled", "cancelled")),
    ],
)
def test_an_outcome_that_may_be_is_not_complained_about(
    sent: dict[str, Any], found: Result
) -> None:
    assert list(wrong_outcomes([Submission(0.0, (sent,))], [found])) == []


@pytest.mark.parametrize(
    ("sent", "found", "wrong"),
    [
        (job(), result(revision="b"), "was answered by revision b"),
        (job(), result(revision=None), "was answered by revision None"),
        (job(lora=None), result(revision="a"), "was answered by revision a"),
        (job(lora="c"), result(revision="d-7"), "was answered by revision d-7"),
        (job(metadata=BAD), result(), "was answered with the metadata"),
        (job(), failed("bad_prompt"), "failed with bad_prompt"),
        (job(), failed("adapter_unloaded"), "failed with adapter_unloaded"),
        (job(lora="c"), failed("bad_record"), "failed with bad_record"),
        (job(), failed("out_of_memory", "dead"), "was given up with out_of_memory"),
    ],
)
def test_an_outcome_that_cannot_be_is_a_violation(
    sent: dict[str, Any], found: Result, wrong: str
) -> None:
    (violation,) = wrong_outcomes([Submission(0.0, (sent,))], [found])
    assert wrong in violation


def test_a_slow_recovery_is_told_with_what_became_of_the_last_job(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoveries, "SLOW_SECONDS", 0.0)
    found = recoveries.Recoveries(queue.client, queue.name)
    found.begin("reset", 3)
    assert found.going_on == [], "no job runs"
    queue.submit("sub", "file", 1, 0, [Job(id="job", prompt="x")])
    queue.claim("w", ClaimRequest(1, 0, in_use=[]), lease_seconds=0.01, patience=60)
    found.begin("kill worker", 3)
    time.sleep(0.02)
    queue.sweep()
    found.look()
    assert len(found.going_on) == 1
    suspect = queue.claim_suspect("w", lease_seconds=60)
    assert suspect is not None
    done = Result(
        id="job", submission="sub", lora=None, status="done",
        timings=Timings(queued=suspect.queued, finished=suspect.claimed),
    )  # fmt: skip
    queue.commit("w", [(suspect.lease, done)])
    found.look()
    assert found.going_on == []
    assert len(found.seconds["kill worker"]) == 1
    (text,) = found.slow
    assert re.search(
        r"s from 'kill worker' at .* 3 workers; job and 0 more were the last\..* job was"
        r" sent [-+]\d+\.\d, lease_expired after 0\.\d s \+0\.\d, claimed last \+0\.\d,"
        r" done \+0\.\d",
        text,
    ), text


@pytest.mark.slow
def test_a_short_soak_finds_no_violation(tmp_path: Path) -> None:
    soak = run(4, 8, tmp_path)
    assert soak.violations == []
    assert soak.faults.total() > 0
    assert soak.faults[FLUSH] == 1
    assert soak.operator.given.total() > 0
    assert soak.bench.ledger.results
    assert report.fault_table(soak).row_count > 1
    assert report.command_table(soak).row_count > 1
    assert report.outcome_table(soak).row_count > 10


@pytest.mark.slow
def test_a_soak_with_a_violation_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ledger, "check", lambda *_: ["job x was acknowledged and is not there"])
    monkeypatch.setattr(fault_bench, "REST_SECONDS", 0)
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "0.02", "--seed", "2"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert "job x was acknowledged and is not there" in capsys.readouterr().out
