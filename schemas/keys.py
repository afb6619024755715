"""The names of all Redis keys of one queue, written down once.

All keys of a queue begin with the hash tag ``{queue}``, so that they share one slot of a Redis
Cluster and one Lua script may touch several of them. The Lua scripts get the same names: a
preamble made from ``KEY_NAMES`` defines each as a Lua local of that name.
"""

from __future__ import annotations

#: Field or key name after the hash tag. Names that end in ``:`` are completed by an id.
KEY_NAMES = {
    "JOB": "job:",  # hash: one job, its state and its result
    "STREAM": "stream:",  # stream: ids of the jobs waiting or in flight for one adapter
    "READY": "ready",  # sorted set: adapters with waiting jobs, by the time they wait unserved
    "SUBMISSION": "submission:",  # hash: counts by state; + ":jobs" list, + ":finished" stream
    "SUBMISSIONS": "submissions",  # sorted set: submission ids by the time they were sent
    "LEASES": "leases",  # sorted set: ids of the running jobs by the end of their lease
    "ADAPTERS": "adapters",  # hash: the desired state, name -> AdapterRecord
    "ADAPTERS_VERSION": "adapters:version",  # counter: raised by every change of the desired state
    "FETCHES": "fetches",  # hash: newest request to fetch an adapter, name -> FetchRecord
    "FETCH_TURN": "fetch-turn",  # string: expires when the next fetch may begin
    "WORKERS": "workers",  # sorted set: worker ids by their last heartbeat
    "WORKER": "worker:",  # hash: the observed state of one worker; + ":adapters" set
    "WAKE": "wake",  # channel: new work has come
    "CONTROL": "control",  # channel: the desired state has changed
    "DEAD": "dead",  # stream: jobs given up on
}

#: What a queue may be called: up to 64 letters, digits and ``. _ -``, a letter or digit first.
QUEUE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

#: The one consumer group that reads every adapter's stream.
GROUP = "workers"

#: Stands for the base model where Redis needs a name; no adapter can be called so.
BASE = "@base"


class Keys:
    """The key names of the queue called ``queue``."""

    def __init__(self, queue: str) -> None:
        self.prefix = f"{{{queue}}}:"
        self.ready = self._name("READY")
        self.submissions = self._name("SUBMISSIONS")
        self.leases = self._name("LEASES")
        self.adapters = self._name("ADAPTERS")
        self.adapters_version = self._name("ADAPTERS_VERSION")
        self.fetches = self._name("FETCHES")
        self.fetch_turn = self._name("FETCH_TURN")
        self.workers = self._name("WORKERS")
        self.wake = self._name("WAKE")
        self.control = self._name("CONTROL")
        self.dead = self._name("DEAD")

    def job(self, job_id: str) -> str:
        return self._name("JOB") + job_id

    def stream(self, adapter: str | None) -> str:
        return self._name("STREAM") + (adapter or BASE)

    def submission(self, submission_id: str) -> str:
        return self._name("SUBMISSION") + submission_id

    def submission_jobs(self, submission_id: str) -> str:
        return self.submission(submission_id) + ":jobs"

    def submission_finished(self, submission_id: str) -> str:
        return self.submission(submission_id) + ":finished"

    def worker(self, worker_id: str) -> str:
        return self._name("WORKER") + worker_id

    def worker_adapters(self, worker_id: str) -> str:
        return self.worker(worker_id) + ":adapters"

    def _name(self, key: str) -> str:
        return self.prefix + KEY_NAMES[key]
