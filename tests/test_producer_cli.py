"""The producer's command line: help, mistakes, servers, exit codes. The helpers at the top serve
the other tests of the producer too."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from broker.claims import Claim, ClaimRequest
from broker.embedded import EmbeddedServer
from broker.job_queue import JobQueue
from producer.cli import app
from schemas.adapter import AdapterRecord
from schemas.job import Job
from schemas.result import ErrorInfo, JobState, Result, Timings, Usage
from schemas.worker_state import WorkerState


@dataclass(frozen=True)
class Producer:
    """Runs the command line against one queue of the tests' server."""

    redis_url: str
    queue: str

    def __call__(self, *args: str, stdin: str | bytes | None = None) -> Outcome:
        place = ("--redis-url", self.redis_url, "--queue", self.queue)
        return CliRunner().invoke(app, [*args, *place], input=stdin)

    def start(
        self, *args: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        place = ("--redis-url", self.redis_url, "--queue", self.queue)
        return subprocess.Popen(
            [sys.executable, "-m", "producer.cli", *args, *place],
            stdout=stdout,
            stderr=stderr,
            text=True,
        )


class Worker:
    """Claims jobs like a worker, and finishes them when it is told to."""

    def __init__(self, queue: JobQueue, adapters: tuple[str, ...] = ("sql", "json")) -> None:
        self.id = "worker-1"
        self._queue = queue
        self._adapters = adapters
        self._claims: dict[str, Claim] = {}
        records = {name: AdapterRecord(source=f"/{name}", revision="r1") for name in adapters}
        queue.set_model("tiny-llama")
        queue.announce(records)
        self.beat()

    def beat(self) -> None:
        state = WorkerState(
            id=self.id,
            model="tiny-llama",
            device="cpu",
            started=0,
            adapters=dict.fromkeys(self._adapters, "r1"),
            max_loras_per_batch=4,
        )
        self._queue.heartbeat(state, alive_seconds=60)

    def leave(self) -> None:
        self._queue.leave(self.id)

    def claim(self) -> list[str]:
        request = ClaimRequest(num_jobs=1000, free_slots=4, in_use=())
        found = self._queue.claim(self.id, request, lease_seconds=60, patience=60).jobs
        self._claims |= {claim.lease.job_id: claim for claim in found}
        return [claim.lease.job_id for claim in found]

    def finish(self, job_id: str, status: JobState = "done", text: str = "An answer.") -> None:
        claim = self._claims.pop(job_id)
        result = Result(
            id=job_id,
            submission=claim.submission,
            lora=claim.adapter,
            revision="r1" if claim.adapter else None,
            status=status,
            text=text if status == "done" else None,
            finish_reason="stop",
            usage=Usage(prompt_tokens=3, completion_tokens=5),
            error=None if status == "done" else ErrorInfo(code="bad_prompt", message="It is bad."),
            timings=Timings(queued=claim.queued, started=claim.claimed, finished=claim.claimed + 1),
            worker=self.id,
            metadata=Job.from_wire(claim.payload).metadata,
        )
        self._queue.commit(self.id, [(claim.lease, result)])

    def finish_all(self, status: JobState = "done") -> None:
        for job_id in self.claim():
            self.finish(job_id, status)


def prompts(folder: Path, *lines: str) -> str:
    """A file of these lines."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def embedded_folder() -> Iterator[Path]:
    # Not tmp_path: the path of a Unix socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="lorry-"))
    yield folder
    shutil.rmtree(folder)


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for word in ("submit", "results", "status", "wait", "Exit codes", "6: not finished", "130: "):
        assert word in text


def test_without_a_command_the_help_is_shown() -> None:
    assert "Usage: producer" in CliRunner().invoke(app, [], prog_name="producer").output


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("lorry")


@pytest.mark.parametrize(
    "args",
    [
        ("sumbit",),
        ("submit",),
        ("submit", "a.jsonl", "b.jsonl"),
        ("submit", "a.jsonl", "--loar", "sql"),
        ("results",),
        ("results", "x", "--format", "csv"),
        ("wait",),
        ("wait", "x", "--timeout", "soon"),
        ("wait", "x", "--timeout", "-1"),
        ("status", "x", "y"),
    ],
)
def test_wrong_usage_ends_with_2(args: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, args).exit_code == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ("submit", "x", "--priority", "urgent"),
            "'urgent' is not one of 'high', 'normal', 'low'.",
        ),
        (("submit", "x", "--when-full", ""), "'' is not one of 'wait', 'refuse'."),
        (("results", "x", "--format", "csv"), "'csv' is not one of 'jsonl', 'openai', 'table'."),
        (("wait", "x", "--timeout", "soon"), "should be a valid number, unable to parse"),
        (("lora", "load", "a", "b", "--timeout", "-1"), "should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(args: tuple[str, ...], told: str) -> None:
    outcome = CliRunner().invoke(app, args, env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert outcome.exit_code == 2
    assert f"Invalid value for '{args[-2]}': {told}" in outcome.stderr


@pytest.mark.parametrize("name", ["", "a b", "{a}", "a/b", "x" * 65])
def test_a_wrong_queue_name_is_refused(name: str, redis_url: str) -> None:
    outcome = Producer(redis_url, name)("status")
    assert outcome.exit_code == 2
    assert "cannot name a queue" in outcome.stderr


def test_the_server_in_use_is_told_on_stderr_alone(producer: Producer) -> None:
    outcome = producer("status", "--json")
    assert outcome.stderr == f"Using the server at {producer.redis_url}\n"
    assert outcome.stdout.startswith("{")


def test_without_a_named_server_an_embedded_one_is_used(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_STATE_DIR", str(embedded_folder))
    monkeypatch.delenv("REDIS_URL", raising=False)
    outcome = CliRunner().invoke(app, ["status"])
    assert outcome.exit_code == 0
    assert f"Using the embedded server, started now; data in {embedded_folder}" in outcome.stderr


def test_the_environment_can_name_the_server(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    assert redis_url in CliRunner().invoke(app, ["status"]).stderr


@pytest.mark.parametrize("command", [("status",), ("results", "x"), ("wait", "x")])
def test_an_absent_server_ends_with_4_and_a_remedy(command: tuple[str, ...]) -> None:
    outcome = Producer("redis://localhost:1", "q")(*command)
    assert outcome.exit_code == 4
    assert outcome.stderr.startswith("error: No Redis server answers at redis://localhost:1")
    assert "--redis-url or REDIS_URL" in outcome.stderr


@pytest.mark.parametrize(
    ("url", "exit_code"),
    [
        ("redis://me:secret@localhost:1/0", 4),
        ("redis://localhost:1?password=secret", 2),
        ("redis://:se/secret@localhost:1", 2),
        ("redis://:se#secret@localhost:1", 2),
        ("redis://:se?secret@localhost:1", 2),
        ("redis://me:secret@localhost:port", 2),
        ("http://me:secret@localhost", 2),
        ("me:secret@localhost", 2),
        ("redis://[::1:secret@localhost", 2),
    ],
)
def test_a_password_is_never_shown(url: str, exit_code: int) -> None:
    """And who mistypes the URL is told so, not that the server is away."""
    outcome = Producer(url, "q")("status")
    assert outcome.exit_code == exit_code
    assert "secret" not in outcome.output


def test_every_command_can_be_told_server_password_and_queue() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    commands = dict(group.commands)
    while groups := [name for name, found in commands.items() if isinstance(found, TyperGroup)]:
        for name in groups:
            found = commands.pop(name)
            assert isinstance(found, TyperGroup)
            commands |= {f"{name} {inner}": command for inner, command in found.commands.items()}
    assert len(commands) >= 17
    for name, command in commands.items():
        options = {parameter.name for parameter in command.params}
        assert options.issuperset({"redis_url", "redis_password_file", "queue"}), name


def test_an_error_shows_no_control_characters(producer: Producer) -> None:
    outcome = producer("status", "\x1b[31mred")
    assert "\x1b[31mred" not in outcome.stderr
    assert "\\x1b[31mred" in outcome.stderr


def test_an_id_that_is_not_utf8_is_unknown(producer: Producer) -> None:
    assert producer("status", "\udcff").exit_code == 3


def test_a_lost_server_ends_with_4_while_results_are_awaited(
    embedded_folder: Path, tmp_path: Path
) -> None:
    server = EmbeddedServer(embedded_folder)
    producer = Producer(server.url, "q")
    submission = json.loads(producer("submit", prompts(tmp_path, '"x"'), "--json").stdout)
    with producer.start("wait", submission["submission"]) as process:
        assert process.stderr
        next(line for line in iter(process.stderr.readline, "") if "No worker" in line)
        server.close()
        _, rest = process.communicate()
    assert process.returncode == 4
    assert rest.startswith(f"error: No Redis server answers at {server.url}")


def test_a_reader_that_goes_away_ends_the_program_quietly(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    file = prompts(tmp_path, *['"x"'] * 100)
    submission = json.loads(producer("submit", file, "--json").stdout)["submission"]
    Worker(queue).finish_all()
    with producer.start("results", submission) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == f"Using the server at {producer.redis_url}\n"
    assert process.returncode == 141


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_written_to_in_vain(producer: Producer, closed: str) -> None:
    close = {"stdout": ">&-", "stderr": "2>&-"}[closed]
    place = ("--redis-url", producer.redis_url, "--queue", producer.queue)
    outcome = subprocess.run(
        ["sh", "-c", f'"$@" {close}', "sh", sys.executable, "-m", "producer.cli", "status", *place],
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0
    assert (
        outcome.stdout if closed == "stderr" else outcome.stderr.startswith("Using the server at")
    )
    assert "Traceback" not in outcome.stderr


def test_ctrl_c_while_waiting_ends_with_130_and_says_how_to_go_on(
    producer: Producer, queue: JobQueue, tmp_path: Path
) -> None:
    Worker(queue)
    with producer.start("submit", prompts(tmp_path, '"x"'), "--wait") as process:
        assert process.stderr
        told = iter(process.stderr.readline, "")
        submitted = next(line for line in told if line.startswith("Submitted 1 job as sub-"))
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate()
    assert process.returncode == 130
    assert f"producer results {submitted.split()[-1]} --follow" in rest
    assert "Traceback" not in rest
