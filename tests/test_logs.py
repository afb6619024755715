"""What the worker logs, on a terminal and elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
import structlog

from worker.logs import configure_logs


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def crash(secret_prompt: str) -> None:
    """Log an exception that went through two frames with a prompt in them."""

    def divide(prompt: str) -> None:
        1 / (len(prompt) - len(secret_prompt))

    try:
        divide(secret_prompt)
    except ZeroDivisionError:
        structlog.get_logger().exception("engine_failed")


@pytest.mark.parametrize("on_terminal", [True, False])
def test_an_exception_is_logged_with_its_place_and_without_local_variables(
    on_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    configure_logs()
    crash("an old recipe")
    log = capsys.readouterr().err
    assert "recipe" not in log
    for word in ("engine_failed", "ZeroDivisionError", "test_logs.py", "divide"):
        assert word in log


def test_elsewhere_than_on_a_terminal_an_event_is_one_json_object(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs()
    structlog.get_logger().info("worker_ready", queue="lorry")
    crash("an old recipe")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["worker_ready", "engine_failed"]
    assert events[0]["queue"] == "lorry"
    (exception,) = events[1]["exception"]
    assert exception["exc_type"] == "ZeroDivisionError"
    assert [frame["name"] for frame in exception["frames"]] == ["crash", "divide"]
