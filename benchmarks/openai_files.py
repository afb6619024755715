"""Memory and time that a large OpenAI batch file takes on its way in and out.

    python -m benchmarks.openai_files [--lines 10000 1000000]

Of each size a file is written, sent by `producer submit` to a server of its own, cancelled, since
only its transport is measured, and read by `producer results --format openai`. Printed are the
seconds and the most memory (resident, of the process) of both commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.own_server import OwnServer
from broker.connection import connect
from broker.job_queue import JobQueue
from producer.client import Client

PROMPT = "Which of the bicycles have more than twelve gears, and cost less than 450? " * 3


def write_file(path: Path, num_lines: int) -> None:
    """Chats for the base model and four adapters in turn."""
    with path.open("w") as file:
        for number in range(num_lines):
            adapter = number % 5
            body = {
                "model": f"llama:adapter-{adapter}" if adapter else "llama",
                "messages": [{"role": "user", "content": f"{PROMPT}{number}"}],
                "max_completion_tokens": 64,
            }
            line = {"custom_id": f"request-{number}", "method": "POST", "body": body}
            file.write(json.dumps(line | {"url": "/v1/chat/completions"}) + "\n")


def measured(*command: str) -> tuple[float, int, str]:
    """Seconds, most resident bytes and standard output of a `producer` command."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "producer.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"producer {' '.join(command)} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024, output


def measure(folder: Path, num_lines: int) -> None:
    file, out = folder / "batch.jsonl", folder / "out.jsonl"
    write_file(file, num_lines)
    with OwnServer(folder / f"server-{num_lines}") as server, Client(server.url) as client:
        with connect(server.url) as connection:  # As a worker says when it joins.
            JobQueue(connection, client.queue).set_model("/models/llama")
        seconds, memory, printed = measured(
            "submit", str(file), "--json", "--redis-url", server.url
        )
        print(f"{num_lines:>9} lines in:  {seconds:6.1f} s, {memory / 1e6:5.1f} MB", flush=True)
        submission = json.loads(printed)["submission"]
        client.cancel(submission)
        seconds, memory, _ = measured(
            *("results", submission, "--format", "openai", "-o", str(out)),
            *("--redis-url", server.url),
        )
        print(f"{num_lines:>9} lines out: {seconds:6.1f} s, {memory / 1e6:5.1f} MB", flush=True)
    with (folder / "out.errors.jsonl").open() as lines:
        assert sum(1 for _ in lines) == num_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 1_000_000])
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as folder:
        for num_lines in parser.parse_args().lines:
            measure(Path(folder), num_lines)


if __name__ == "__main__":
    main()
