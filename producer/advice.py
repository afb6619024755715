"""Sentences about jobs that have to wait, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from broker.queue_reader import QueueReader
from producer.spool import Spool

#: Names that a sentence lists.
MAX_LISTED = 20


def warnings(reader: QueueReader, spool: Spool) -> list[str]:
    """Why jobs of the spool may have to wait, one sentence a reason."""
    names = sorted(name for name in spool.num_jobs_by_adapter if name)
    if not reader.has_desired_state():
        unchecked = f", so nobody could tell whether it has {listed(names)}" if names else ""
        return [f"No worker has ever joined queue '{reader.name}'{unchecked}. {START_A_WORKER}"]
    workers = reader.workers()
    if not workers:
        return [no_worker(reader.name)]
    served = {name for worker in workers for name in worker.adapters}
    if missing := [name for name in names if name not in served]:
        return [f"No living worker serves {listed(missing)}; the jobs wait until one does."]
    return []


#: What to do when nobody works.
START_A_WORKER = "Jobs wait until one is started: worker --model-path DIR"


def no_worker(queue: str) -> str:
    return f"No worker is alive on queue '{queue}'. {START_A_WORKER}"


def no_fetcher(queue: str) -> str:
    return (
        f"Nobody fetches from the hub for queue '{queue}'. Start `fetcher --model-path DIR"
        " --hub-owners OWNER`, or a worker with --with-fetcher --hub-owners OWNER."
    )


def counted(number: int, noun: str = "job") -> str:
    """ "1 job", "12 jobs" """
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """The names with commas; a long list is cut."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
