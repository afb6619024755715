"""The whole way in one command: `make demo`, or `python -m examples.demo`.

Starts an embedded server in a folder of its own and a worker on the CPU with three real adapters,
submits `prompts.jsonl`, shows progress, prints every answer and the totals, and ends what it
started.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from broker.embedded import EmbeddedServer
from examples.smollm2 import ModelNotInstalled, model_folder
from producer.client import Client
from producer.tables import prompt_of
from schemas.errors import LorryError
from schemas.result import Result
from schemas.worker_state import WorkerState

FOLDER = Path(__file__).parent
ADAPTERS = ("json-facts", "sql", "support")

#: Seconds that the worker may take to load model and adapters on a slow machine.
START_TIMEOUT = 120.0

#: Seconds for which the worker's counters may lag behind the results: two heartbeats, and some.
COUNTERS_TIMEOUT = 6.0


class DemoError(LorryError):
    """The worker ended, never came up, or fell silent."""


@contextmanager
def running_worker(url: str, model: Path, log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own; asked to end, and waited for, at the end."""
    loras = [f"{name}={FOLDER / 'adapters' / name}" for name in ADAPTERS]
    command = [
        *(sys.executable, "-m", "worker.cli", "--device", "cpu", "--redis-url", url),
        *("--model-path", str(model), "--lora-paths", *loras),
        *("--max-loras-per-batch", str(len(ADAPTERS))),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_alive(client: Client, process: subprocess.Popen[bytes], log_path: Path) -> None:
    """Return when the worker has joined the queue."""
    deadline = time.monotonic() + START_TIMEOUT
    while not client.has_worker():
        if process.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"The worker did not come up. Its log:\n{log_path.read_text()}")
        time.sleep(0.1)


def run_jobs(
    client: Client, submission: str, process: subprocess.Popen[bytes], log_path: Path, bar: Progress
) -> list[Result]:
    """Show progress until all jobs have finished; their results in input order."""
    total = sum(1 for _ in client.results(submission))
    task = bar.add_task("loading model and adapters", total=total)
    wait_until_alive(client, process, log_path)
    bar.update(task, description="answering")

    def check() -> None:
        if process.poll() is not None:
            raise DemoError(f"The worker ended. Its log:\n{log_path.read_text()}")

    for _ in client.follow(submission, on_wake=check):
        bar.advance(task)
    return list(client.results(submission))


def final_state(client: Client, output_tokens: int) -> WorkerState:
    """The worker's counters, once they have caught up with the results."""
    deadline = time.monotonic() + COUNTERS_TIMEOUT
    while True:
        workers = client.overview().workers
        is_over = time.monotonic() > deadline
        if workers and (workers[0].output_tokens >= output_tokens or is_over):
            return workers[0]
        if is_over:
            raise DemoError("All jobs have ended, but the worker does not report any more.")
        time.sleep(0.1)


def answers_table(client: Client, results: list[Result]) -> Table:
    """One row a job."""
    table = Table("job", "adapter", "prompt", show_lines=True)
    table.add_column("answer", overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("time", justify="right")
    payloads = client.payloads([result.id for result in results])
    for number, (result, payload) in enumerate(zip(results, payloads, strict=True), start=1):
        answer = result.text if result.error is None else f"[{result.error.code}]"
        table.add_row(
            f"{number}",
            result.lora or "(base)",
            prompt_of(payload),
            answer,
            f"{result.usage.completion_tokens}",
            f"{(result.timings.finished or 0) - (result.timings.started or 0):.1f} s",
        )
    return table


def totals(results: list[Result], state: WorkerState) -> str:
    """The line at the end."""
    begun = min(result.timings.started or result.timings.queued for result in results)
    ended = max(result.timings.finished or begun for result in results)
    seconds = max(ended - begun, 0.001)
    tokens = sum(result.usage.completion_tokens for result in results)
    done = sum(result.status == "done" for result in results)
    return (
        f"{done} of {len(results)} jobs done in {seconds:.1f} s:"
        f" {len(results) / seconds:.1f} jobs/s, {tokens / seconds:.0f} tokens/s,"
        f" {state.batches} batches,"
        f" at most {state.max_adapters_in_batch} distinct adapters in one batch"
    )


def demo() -> int:
    """Run the demo; the exit status."""
    model = model_folder()
    with tempfile.TemporaryDirectory(prefix="lorry-demo-") as name:
        folder = Path(name)
        with (
            EmbeddedServer(folder / "state") as server,
            Client(server.url) as client,
            running_worker(server.url, model, folder / "worker.log") as process,
        ):
            print(f"Server: embedded, data in {server.folder}. Worker: CPU, process {process.pid}.")
            submission = client.submit_file(FOLDER / "prompts.jsonl")
            with Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                transient=True,
            ) as bar:
                results = run_jobs(client, submission, process, folder / "worker.log", bar)
            state = final_state(client, sum(r.usage.completion_tokens for r in results))
            Console(width=None if sys.stdout.isatty() else 120).print(
                answers_table(client, results)
            )
            print(totals(results, state))
    return 0 if all(result.status == "done" for result in results) else 1


def main() -> None:
    """Run the demo as a command."""
    # A demo that is told to end takes its worker and server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(demo())
    except (LorryError, ModelNotInstalled) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
