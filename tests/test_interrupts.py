"""Ctrl-C at any moment ends a command with 130 and without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.waiting import PATIENCE
from tests.tiny_models import make_llama

PRODUCER = ("producer", "status")
WORKER = ("worker", "--model-path", ".", "--redis-url", "redis://127.0.0.1:1")
FETCHER = ("worker.hub", "--model-path", ".", "--hub-owners", "acme")
NOTIFIER = ("worker.webhooks", "--webhook-hosts", "example.org")


def interrupted_after(imported: str, command: tuple[str, ...]) -> tuple[int, list[str]]:
    """Exit code, and what was written on stderr, after Ctrl-C when a module has been imported."""
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        assert any(line.split("|")[-1].strip() == imported for line in lines)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().splitlines()
    return process.returncode, [line for line in rest if not line.startswith("import time:")]


@pytest.mark.parametrize(
    ("command", "imported"),
    [
        (PRODUCER, "typing"),
        (PRODUCER, "pydantic.main"),
        (PRODUCER, "redis.connection"),
        (WORKER, "argparse"),
        (WORKER, "torch._C"),
        (FETCHER, "argparse"),
        (FETCHER, "rq.job"),
        (NOTIFIER, "rq.job"),
    ],
)
def test_ctrl_c_during_an_import_shows_no_traceback(
    command: tuple[str, ...], imported: str
) -> None:
    assert interrupted_after(imported, command) == (130, [])


def test_ctrl_c_while_a_worker_waits_for_its_server_shows_no_traceback(tmp_path: Path) -> None:
    command = ("worker", "--model-path", str(make_llama(tmp_path)), "--device", "cpu")
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--redis-url", "redis://127.0.0.1:1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        assert any("redis_away" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130


def test_whoever_lets_ctrl_c_do_nothing_is_obeyed() -> None:
    """As a shell does for a command that it starts in the background."""
    told = subprocess.run(
        [sys.executable, "-c", IGNORING, sys.executable],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert told.returncode == 0
    assert told.stdout.startswith("lorry")


IGNORING = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
process = subprocess.Popen(
    [sys.argv[1], "-X", "importtime", "-m", "producer", "--version"], stderr=subprocess.PIPE
)
while b"typer._click.core" not in process.stderr.readline():
    pass
process.send_signal(signal.SIGINT)
process.stderr.read()
sys.exit(process.wait())
"""
