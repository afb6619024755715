"""Sentences about jobs that have to wait, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from broker.queue_reader import QueueReader
from schemas.adapter import AdapterRecord
from schemas.worker_state import WorkerState

#: Names that a sentence lists.
MAX_LISTED = 20


def warnings(reader: QueueReader, adapters: Iterable[str | None]) -> list[str]:
    """Why jobs of the adapters may have to wait, one sentence a reason; None is the base model."""
    names = sorted(name for name in adapters if name)
    if not reader.has_desired_state():
        unchecked = f", so nobody could tell whether it has {listed(names)}" if names else ""
        return [f"No worker has ever joined queue '{reader.name}'{unchecked}. {START_A_WORKER}"]
    workers = reader.workers()
    return unserved(names, workers) if workers else [no_worker(reader.name)]


def unserved(names: Iterable[str], workers: Sequence[WorkerState]) -> list[str]:
    """Which of the adapters none of the workers serves, why, and what to do, in sentences."""
    served = {name for worker in workers for name in worker.adapters}
    missing = [name for name in names if name not in served]
    failed = [name for name in missing if any(name in w.adapter_errors for w in workers)]
    sentences = [
        f"No living worker can serve '{name}', so its jobs wait: {why_not(name, workers)}"
        f" {remedy(name)}"
        for name in failed[:MAX_LISTED]
    ]
    told = set(failed[:MAX_LISTED])
    if others := [name for name in missing if name not in told]:
        sentences.append(f"No living worker serves {listed(others)}; the jobs wait until one does.")
    return sentences


def why_not(name: str, workers: Sequence[WorkerState]) -> str:
    """The workers' reasons not to serve an adapter, each with how many give it if they differ."""
    reasons = Counter(w.adapter_errors[name] for w in workers if name in w.adapter_errors)
    if len(reasons) == 1:
        return next(iter(reasons))
    return " ".join(f"({number} of {len(workers)}) {why}" for why, number in reasons.items())


def remedy(name: str) -> str:
    """What to do about an adapter that cannot be loaded."""
    return (
        f"`producer lora load {name} PATH` loads it from another folder;"
        f" `producer lora unload {name} --force` forgets it, and fails its jobs."
    )


def known_adapters(records: Mapping[str, AdapterRecord]) -> str:
    """Their names in one sentence, each with what keeps it from serving."""
    return f"Known adapters: {listed([_named(*item) for item in records.items()])}."


def _named(name: str, record: AdapterRecord) -> str:
    if record.unloading:
        return f"{name} (being unloaded)"
    is_loaded = record.revision or record.previous
    return name if is_loaded else f"{name} (not loaded by any worker yet)"


#: What to do when nobody works.
START_A_WORKER = "Jobs wait until one is started: worker --model-path DIR"


def no_worker(queue: str) -> str:
    return f"No worker is alive on queue '{queue}'. {START_A_WORKER}"


def no_fetcher(queue: str) -> str:
    return (
        f"Nobody fetches from the hub for queue '{queue}'. Start `fetcher --model-path DIR"
        " --hub-owners OWNER`, or a worker with --with-fetcher --hub-owners OWNER."
    )


def no_notifier(queue: str) -> str:
    return (
        f"Nobody delivers webhooks for queue '{queue}'. This one is kept until somebody starts"
        " `notifier --webhook-hosts HOST`."
    )


def counted(number: int, noun: str = "job") -> str:
    """ "1 job", "12 jobs" """
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


#: Powers of 1000, as `producer limits` reads them.
_BYTE_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def counted_bytes(number: int) -> str:
    """ "812 bytes", "5 MB", "1.2 GB": to a tenth."""
    for size, unit in _BYTE_UNITS:
        if number >= size - size // 20_000:  # From there on it would be 1000 of the unit below.
            return f"{number / size:.1f}".removesuffix(".0") + f" {unit}"
    return counted(number, "byte")


def exact_bytes(number: int) -> str:
    """ "5 MB", "1250 kB", "999999 bytes": in the largest unit that leaves no fraction."""
    for size, unit in _BYTE_UNITS:
        if number % size == 0:
            return f"{number // size} {unit}"
    return counted(number, "byte")


def listed(names: Sequence[str]) -> str:
    """The names with commas; a long list is cut."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
