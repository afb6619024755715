"""What the queue costs: jobs through `producer`, a server and a `worker`, beside the engine alone.

    python -m benchmarks.through_queue MODEL JOBS.jsonl ... [--adapters FOLDER]

Takes the flags of `benchmarks.workload`, which it runs first, in a process of its own. Then a real
worker is started on a real server, and each file is submitted twice by `producer submit`; the clock
of the second run starts when the first job stands in the queue, and stops when the last result has
been recorded. One JSON line a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.workload import add_flags, configured
from broker.embedded import EmbeddedServer
from producer.client import Client
from schemas.errors import LorryError
from schemas.job import Job

#: Seconds for the worker to become ready.
_START_SECONDS = 180.0


def engine_alone(arguments: list[str]) -> dict[str, float]:
    """Output tokens a second of each workload's last run."""
    command = [sys.executable, "-m", "benchmarks.workload", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["workload"]: line["output_tokens_per_s"] for line in lines}


def worker_flags(flags: dict[str, Any], jobs: list[Job]) -> list[str]:
    """The worker's command line."""
    names = sorted({job.lora for job in jobs if job.lora})
    command = ["--model-path", str(flags["model"])]
    if names:
        command += ["--lora-paths", *(f"{name}={flags['adapters'] / name}" for name in names)]
    for name, value in flags.items():
        if name not in ("model", "jobs", "adapters", "disable_prefix_cache") and value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return [*command, "--disable-prefix-cache"]  # Prompts of the second run are those of the first.


def seconds_through_queue(client: Client, url: str, file: Path) -> float:
    """From the first job's coming into the queue to the last one's result."""
    sent = subprocess.run(
        [sys.executable, "-m", "producer.cli", "submit", "--redis-url", url, "--json", file],
        check=True,
        stdout=subprocess.PIPE,
    )
    submission = json.loads(sent.stdout)["submission"]
    client.wait(submission)
    ended = time.time()
    results = list(client.results(submission))
    if failed := [result for result in results if result.status != "done"]:
        raise LorryError(f"{len(failed)} jobs failed, such as {failed[0].id}: {failed[0].error}")
    return ended - min(result.timings.queued for result in results)


def wait_for_worker(client: Client, worker: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not client.has_worker():
        if worker.poll() is not None or time.monotonic() > deadline:
            raise LorryError("The worker did not start; its log is above.")
        time.sleep(0.1)


def main() -> None:
    """Run the workloads both ways; a person's mistake is answered with a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    flags = vars(parser.parse_args())
    try:
        _, workloads = configured(dict(flags))
        alone = engine_alone(sys.argv[1:])
        with tempfile.TemporaryDirectory(prefix="lorry-") as folder:
            _through_queue(Path(folder), flags, workloads, alone)
    except (LorryError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


def _through_queue(
    folder: Path,
    flags: dict[str, Any],
    workloads: dict[str, list[Job]],
    alone: dict[str, float],
) -> None:
    all_jobs = [job for jobs in workloads.values() for job in jobs]
    command = [sys.executable, "-m", "worker.cli", *worker_flags(flags, all_jobs)]
    with EmbeddedServer(folder / "state") as server, Client(server.url) as client:
        worker = subprocess.Popen([*command, "--redis-url", server.url])
        try:
            wait_for_worker(client, worker)
            for name, jobs in workloads.items():
                file = folder / f"{name}.jsonl"
                # Without ids, since a job that was sent before is not run again.
                lines = (job.model_dump_json(exclude={"id"}, exclude_none=True) for job in jobs)
                file.write_text("".join(f"{line}\n" for line in lines))
                num_tokens = sum(job.max_tokens for job in jobs)
                for _ in range(2):
                    rate = num_tokens / seconds_through_queue(client, server.url, file)
                figures = {
                    "workload": name,
                    "engine_alone_tokens_per_s": alone[name],
                    "through_queue_tokens_per_s": round(rate, 1),
                    "loss": round(1 - rate / alone[name], 4),
                }
                print(json.dumps(figures), flush=True)
        finally:
            worker.terminate()
            worker.wait()


if __name__ == "__main__":
    main()
