"""The check of a whole queue at rest against the sender's own record of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import redis

from schemas.keys import WHOLE_QUEUE, Keys
from schemas.result import STATES, TERMINAL_STATES, Result

if TYPE_CHECKING:
    from benchmarks.ledger import Ledger

#: What a queue at rest may hold: records of jobs and submissions, adapters, settings, dead jobs.
#: Any other key speaks of work that is not over, unless it is a hash of counters that are all 0.
KEPT = frozenset(
    {
        *("job", "submission", "submissions", "dead", "expiry", "notices"),
        *("adapters", "fetches", "settings", "limits", "paused", "workers"),
    }
)

#: What may be there as long as it expires by itself.
EXPIRING = frozenset({"worker", "claim", "fetch-turn", "webhook-hosts"})


class QueueCheck:
    """One scan of a queue."""

    def __init__(self, ledger: Ledger, client: redis.Redis, queue: str) -> None:
        self._ledger = ledger
        # As QueueReader: redis-py types a reply as everything it can be.
        self._client: Any = client
        self._keys = Keys(queue)
        prefix = self._keys.prefix
        names = sorted(set(client.scan_iter(match=_escaped(prefix) + "*", count=1000)))
        self._types = {name.removeprefix(prefix): client.type(name) for name in names}
        self._jobs = {
            name.removeprefix("job:"): self._client.hgetall(prefix + name)
            for name, kind in self._types.items()
            if name.startswith("job:") and kind == "hash"
        }

    def violations(self) -> Iterator[str]:
        yield from self._jobs_that_were_sent()
        for id_, fields in self._jobs.items():
            yield from self._one_outcome(id_, fields)
            yield from self._end_that_was_asked_for(id_, fields)
            yield from self._claim_in_its_time(id_, fields)
        yield from self._results_that_changed()
        yield from self._submissions()
        yield from self._notices()
        yield from self._dead()
        for name in self._types:
            yield from self._left_over(name)

    def _jobs_that_were_sent(self) -> Iterator[str]:
        acknowledged = {id_ for ids in self._ledger.acknowledged.values() for id_ in ids}
        for id_ in sorted(acknowledged - self._jobs.keys()):
            yield f"job {id_} was acknowledged and is not there"
        for id_ in sorted(self._jobs.keys() - acknowledged - set(self._ledger.unsure)):
            was_refused = id_ in self._ledger.refused
            who = "its sender was told that it was not sent" if was_refused else "nobody sent it"
            yield f"job {id_} is there and {who}"

    def _one_outcome(self, id_: str, fields: dict[str, str]) -> Iterator[str]:
        state, result, code = fields.get("state"), fields.get("result"), fields.get("error_code")
        if state not in TERMINAL_STATES:
            yield f"job {id_} is in state {state}"
            return
        if result is not None and code is not None:
            yield f"job {id_} has a result and was also ended with {code}"
        elif result is not None:
            yield from self._result_fits(id_, state, result)
        elif code is None or not fields.get("error_message"):
            yield f"job {id_} is {state} without a result and without a reason"
        if fields.get("entry") and state != "dead":
            yield f"job {id_} is {state} and still has a delivery"

    def _result_fits(self, id_: str, state: str, text: str) -> Iterator[str]:
        result = json.loads(text)
        if (result["id"], result["status"]) != (id_, state):
            yield f"job {id_} is {state}; its result says {result['id']} is {result['status']}"
        if state != "done" and not (result.get("error") or {}).get("message"):
            yield f"job {id_} is {state} without a reason"

    def _end_that_was_asked_for(self, id_: str, fields: dict[str, str]) -> Iterator[str]:
        state = fields.get("state")
        if state == "cancelled" and id_ not in self._ledger.cancelled:
            yield f"job {id_} is cancelled and nobody asked for that"
        elif state == "expired" and int(fields["finished"]) < float(fields.get("deadline", "inf")):
            yield f"job {id_} is expired and its deadline had not come"

    def _claim_in_its_time(self, id_: str, fields: dict[str, str]) -> Iterator[str]:
        """The claim that led to its outcome, or was under way when it was cancelled."""
        if "claimed" not in fields:
            return
        claimed, adapter = int(fields["claimed"]), fields["adapter"]
        if "deadline" in fields and claimed >= int(fields["deadline"]):
            yield f"job {id_} was claimed when its deadline had come"
        for pause in self._ledger.pauses:
            until = math.inf if pause.until is None else 1000 * pause.until
            # Claims are dated in whole milliseconds.
            if pause.adapter in (adapter, WHOLE_QUEUE) and 1000 * pause.since + 1 < claimed < until:
                yield f"job {id_} was claimed while {pause.adapter} was paused"

    def _results_that_changed(self) -> Iterator[str]:
        for id_, seen in self._ledger.results.items():
            fields = self._jobs.get(id_, {})
            stored = fields.get("result")
            now = Result.model_validate_json(stored) if stored else None
            if fields.get("state") != seen.status or (now and now != seen):
                yield f"job {id_} was seen as {seen.status}, and its outcome has changed since"

    def _submissions(self) -> Iterator[str]:
        listed = set(self._client.zrange(self._keys.submissions, 0, -1))
        stored = {
            name.removeprefix("submission:")
            for name, kind in self._types.items()
            if name.startswith("submission:") and kind == "hash"
        }
        for id_ in sorted(listed ^ stored):
            yield f"submission {id_} is {'not stored' if id_ in listed else 'not listed'}"
        for id_ in sorted(self._ledger.acknowledged.keys() - stored):
            yield f"submission {id_} was acknowledged and is not there"
        for id_ in sorted(stored):
            yield from self._counts_add_up(id_)

    def _counts_add_up(self, id_: str) -> Iterator[str]:
        fields = self._client.hgetall(self._keys.submission(id_))
        job_ids = self._client.lrange(self._keys.submission_jobs(id_), 0, -1)
        sent = self._ledger.acknowledged.get(id_)
        if sent is not None and (job_ids != sent or int(fields["total"]) != len(sent)):
            yield f"submission {id_} holds other jobs than were sent"
        counts = {state: int(fields.get(state, 0)) for state in STATES}
        states = Counter(self._jobs.get(job_id, {}).get("state") for job_id in job_ids)
        counted = {state: states[state] for state in STATES}
        if counts != counted:
            yield f"submission {id_} counts {_non_zero(counts)}; its jobs are {_non_zero(counted)}"
        finished = self._client.xrange(self._keys.submission_finished(id_))
        told = Counter(entry["id"] for _, entry in finished)
        for job_id, number in sorted((Counter(job_ids) - told).items()):
            yield f"submission {id_} tells {number} times too seldom that job {job_id} has finished"
        for job_id, number in sorted((told - Counter(job_ids)).items()):
            yield f"submission {id_} tells {number} times too often that job {job_id} has finished"

    def _notices(self) -> Iterator[str]:
        """A webhook that was not told yet stands in the index, and nothing else does."""
        due = set(self._client.zrange(self._keys.notices, 0, -1))
        for name, kind in self._types.items():
            id_ = name.removeprefix("submission:")
            if not name.startswith("submission:") or kind != "hash":
                continue
            fields = self._client.hgetall(self._keys.submission(id_))
            state = fields.get("webhook_state")
            has_ended = sum(int(fields.get(s, 0)) for s in TERMINAL_STATES) >= int(fields["total"])
            if has_ended and ("webhook" in fields) != (state in ("pending", "delivered", "dead")):
                yield f"submission {id_} has ended, and its webhook is in state {state}"
            if (state == "pending") != (id_ in due):
                where = "in" if id_ in due else "not in"
                yield f"the webhook of submission {id_} is in state {state} and {where} the index"
            due.discard(id_)
        for id_ in sorted(due):
            yield f"the webhook of submission {id_}, which is not there, is to be told"

    def _dead(self) -> Iterator[str]:
        if self._types.get("dead", "stream") != "stream":
            yield "the dead letters are no stream"
            return
        entries = Counter(entry["id"] for _, entry in self._client.xrange(self._keys.dead))
        dead = {id_ for id_, fields in self._jobs.items() if fields.get("state") == "dead"}
        for id_ in sorted(dead | entries.keys()):
            if entries[id_] != (id_ in dead):
                state = self._jobs.get(id_, {}).get("state")
                yield f"job {id_} is {state} and stands {entries[id_]} times among the dead letters"

    def _left_over(self, name: str) -> Iterator[str]:
        family, kind, key = name.partition(":")[0], self._types[name], self._keys.prefix + name
        if family in KEPT:
            return
        if family in EXPIRING:
            if self._client.pttl(key) == -1:
                yield f"{name} never expires"
        elif kind == "stream":
            yield f"{name} is left with {self._client.xlen(key)} entries{self._pending(key)}"
        elif kind == "hash" and all(_is_zero(v) for v in self._client.hvals(key)):
            return
        else:
            yield f"{name} ({kind}) is left over"

    def _pending(self, key: str) -> str:
        try:
            consumers = [
                f"{consumer['name']} has {consumer['pending']} pending"
                for group in self._client.xinfo_groups(key)
                for consumer in self._client.xinfo_consumers(key, group["name"])
                if consumer["pending"]
            ]
        except redis.ResponseError:  # It has gone since it was found: the queue is not at rest.
            return ""
        return "".join(f"; consumer {text}" for text in consumers)


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False


def _non_zero(counts: dict[Any, int]) -> dict[str, int]:
    return {state: number for state, number in counts.items() if number}


def _escaped(prefix: str) -> str:
    """As a pattern of SCAN that matches only itself."""
    return "".join(f"\\{letter}" if letter in "*?[]^\\" else letter for letter in prefix)
