"""arq's part of `benchmarks.queue_vs_rq`; prints the seconds that so many empty jobs took.

It runs with a Python of its own (``arq_python`` there): arq asks for redis-py below 6, Lorry for 8.

    python arq_jobs.py SOCKET JOBS QUEUE
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker, func


async def nothing(context: dict[Any, Any]) -> None:
    """arq's empty job."""


def _to_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()


async def seconds(socket: str, num_jobs: int, queue: str) -> float:
    """From the first enqueue to the end of the last job."""
    pool = await create_pool(
        RedisSettings(unix_socket_path=socket),
        job_serializer=_to_json,
        job_deserializer=json.loads,
        default_queue_name=queue,
    )
    start = time.monotonic()
    for _ in range(num_jobs):
        await pool.enqueue_job("nothing")
    worker = Worker(
        [func(nothing, name="nothing")],
        redis_pool=pool,
        queue_name=queue,
        burst=True,
        handle_signals=False,
        max_jobs=100,
        poll_delay=0.01,
        job_serializer=_to_json,
        job_deserializer=json.loads,
    )
    await worker.async_run()
    elapsed = time.monotonic() - start
    if worker.jobs_complete != num_jobs:
        raise RuntimeError(f"{worker.jobs_complete} of {num_jobs} jobs were done")
    await worker.close()
    return elapsed


if __name__ == "__main__":
    print(asyncio.run(seconds(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
