"""The soak: its plan follows from its seed, and it fails if the checker finds anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import fault_bench, soak
from benchmarks.ledger import Ledger
from benchmarks.soak import OTHER_FAULTS, WORKER_FAULTS, Fault, make_plan

pytestmark = pytest.mark.slow


def test_a_plan_follows_from_its_seed() -> None:
    assert make_plan(5, 60) == make_plan(5, 60)
    assert make_plan(5, 60) != make_plan(6, 60)


def test_ten_minutes_hold_every_fault() -> None:
    kinds = {event.kind for event in make_plan(1, 600) if isinstance(event, Fault)}
    assert kinds == {*WORKER_FAULTS, *OTHER_FAULTS}


def test_a_short_soak_finds_no_violation(tmp_path: Path) -> None:
    bench, figures = soak.run(4, 6, tmp_path)
    assert figures.violations == []
    assert figures.faults.total() > 0
    assert bench.ledger.results
    assert soak.fault_table(figures).row_count > 1
    assert soak.outcome_table(bench, figures).row_count > 10


def test_a_soak_with_a_violation_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ledger, "check", lambda *_: ["job x was acknowledged and is not there"])
    monkeypatch.setattr(fault_bench, "REST_SECONDS", 0)
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "0.02", "--seed", "2"])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == 1
    assert "job x was acknowledged and is not there" in capsys.readouterr().out
