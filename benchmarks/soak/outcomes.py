"""Whether each job ended as it may, considering what was asked of it and done to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.soak.plan import COMMANDED, Plan, Submission
from schemas.result import Result

#: Why a job of an adapter may fail that is unloaded.
UNLOADED = ("adapter_unloaded", "unknown_adapter")


def wrong_outcomes(plan: Plan, results: Iterable[Result]) -> Iterator[str]:
    """What cannot have become of a job, as a sentence each."""
    sent = {job["id"]: job for event in plan if isinstance(event, Submission) for job in event.jobs}
    for result in results:
        if wrong := _what_is_wrong(sent[result.id], result):
            yield f"job {result.id} {wrong}"


def _what_is_wrong(job: dict[str, Any], result: Result) -> str | None:
    fault, lora, code = (
        job["metadata"]["fault"] or {},
        job["lora"],
        result.error and result.error.code,
    )
    if result.status == "done":
        if result.metadata != job["metadata"]:
            return f"was answered with the metadata {result.metadata}"
        if not _may_answer(lora, result.revision):
            return f"of adapter {lora} was answered by revision {result.revision}"
    elif result.status == "failed":
        is_bad, is_unloaded = fault.get("do") == "fail", lora in COMMANDED and code in UNLOADED
        if not is_unloaded and not (is_bad and code == "bad_prompt"):
            return f"failed with {code}"
    elif result.status == "dead" and code != "attempts_exhausted":
        return f"was given up with {code}"
    return None


def _may_answer(lora: str | None, revision: str | None) -> bool:
    """Whether an adapter was ever to be of that revision, which is its folder's name."""
    if lora is None or revision is None:
        return lora == revision
    return bool(re.fullmatch(rf"{lora}(-\d+)?" if lora in COMMANDED else lora, revision))
