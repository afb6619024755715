"""The names of all Redis keys of one queue, written down once.

All keys of a queue begin with the hash tag ``{queue}``, so that they share one slot of a Redis
Cluster and one Lua script may touch several of them. The Lua scripts get the same names: a
preamble made from ``KEY_NAMES`` defines each as a Lua local of that name.

A band, ``<adapter>:<priority>``, is what waits for one adapter at one priority; a lane,
``<band>:<submission>``, is what one submission has there, a stream of its own.
"""

from __future__ import annotations

from schemas.job import Priority

#: Field or key name after the hash tag. Names that end in ``:`` are completed by an id.
KEY_NAMES = {
    "JOB": "job:",  # hash: one job, its state and its result
    "STREAM": "stream:",  # stream: ids of the jobs of one lane that wait or are in flight
    "LANES": "lanes:",  # sorted set: submissions with jobs in one band, since when unserved
    "READY": "ready:",  # sorted set: adapters with jobs of one priority, since when unserved
    "WAITING": "waiting",  # hash: number of waiting jobs by adapter
    "RUNNING": "running",  # hash: number of running jobs by adapter
    "BACKLOG": "backlog",  # hash: jobs that wait, and the bytes of their records
    "SUBMISSION": "submission:",  # hash: counts by state; + ":jobs" list, + ":finished" stream
    "SUBMISSIONS": "submissions",  # sorted set: submission ids by the time they were sent
    "DEADLINES": "deadlines",  # sorted set: ids of the waiting jobs that have a deadline, by it
    "PAUSED": "paused",  # hash: adapters that nothing is claimed of, "*" the queue, since when
    "LIMITS": "limits",  # hash: how many jobs and bytes may wait
    "EXPIRY": "expiry",  # sorted set: submissions whose jobs have all ended, by when they expire
    "NOTICES": "notices",  # sorted set: submissions whose webhook is to be told, by when
    "WEBHOOK_HOSTS": "webhook-hosts",  # string: hosts that webhooks may go to; expires
    "LEASES": "leases",  # sorted set: ids of the running jobs by the end of their lease
    "SUSPECTS": "suspects",  # sorted set: waiting jobs to be run alone, by since when they wait
    "DELAYED": "delayed",  # sorted set: waiting jobs to be tried again, by when
    "SET_ASIDE": "set-aside",  # sorted set: jobs of versions nobody could read, by the version
    "SETTINGS": "settings",  # hash: what all workers follow (max_attempts), and their model
    "CLAIM": "claim:",  # string: number of a worker's last claim, and the ids of its jobs
    "ADAPTERS": "adapters",  # hash: the desired state, name -> AdapterRecord
    "ADAPTERS_VERSION": "adapters:version",  # counter: raised by every change of the desired state
    "FETCHES": "fetches",  # hash: newest request to fetch an adapter, name -> FetchRecord
    "FETCH_TURN": "fetch-turn",  # string: expires when the next fetch may begin
    "WORKERS": "workers",  # sorted set: worker ids by their last heartbeat
    "WORKER": "worker:",  # hash: the observed state of one worker; + ":adapters" set
    "WAKE": "wake",  # channel: new work has come
    "CANCELLED": "cancelled",  # channel: ids of running jobs that have just been cancelled
    "CONTROL": "control",  # channel: the desired state has changed
    "DEAD": "dead",  # stream: jobs given up on
}

#: What a queue may be called: up to 64 letters, digits and ``. _ -``, a letter or digit first.
QUEUE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

#: The one consumer group that reads every adapter's stream, and its only consumer: which worker
#: has a job stands in the job, so that a worker that ends leaves no consumer behind.
GROUP = "workers"

#: Executions of a job before it is given up on, unless the queue's settings say otherwise.
DEFAULT_MAX_ATTEMPTS = 3

#: Stands for the whole queue among what is paused.
WHOLE_QUEUE = "*"

#: Stands for the base model where Redis needs a name; no adapter can be called so.
BASE = "@base"


class Keys:
    """The key names of the queue called ``queue``."""

    def __init__(self, queue: str) -> None:
        self.prefix = f"{{{queue}}}:"
        self.waiting = self._name("WAITING")
        self.running = self._name("RUNNING")
        self.backlog = self._name("BACKLOG")
        self.submissions = self._name("SUBMISSIONS")
        self.paused = self._name("PAUSED")
        self.limits = self._name("LIMITS")
        self.expiry = self._name("EXPIRY")
        self.notices = self._name("NOTICES")
        self.webhook_hosts = self._name("WEBHOOK_HOSTS")
        self.leases = self._name("LEASES")
        self.suspects = self._name("SUSPECTS")
        self.delayed = self._name("DELAYED")
        self.set_aside = self._name("SET_ASIDE")
        self.settings = self._name("SETTINGS")
        self.adapters = self._name("ADAPTERS")
        self.adapters_version = self._name("ADAPTERS_VERSION")
        self.fetches = self._name("FETCHES")
        self.fetch_turn = self._name("FETCH_TURN")
        self.workers = self._name("WORKERS")
        self.wake = self._name("WAKE")
        self.cancelled = self._name("CANCELLED")
        self.control = self._name("CONTROL")
        self.dead = self._name("DEAD")

    def job(self, job_id: str) -> str:
        return self._name("JOB") + job_id

    def stream(self, adapter: str | None, priority: Priority, submission: str) -> str:
        return f"{self._name('STREAM')}{adapter or BASE}:{priority}:{submission}"

    def submission(self, submission_id: str) -> str:
        return self._name("SUBMISSION") + submission_id

    def submission_jobs(self, submission_id: str) -> str:
        return self.submission(submission_id) + ":jobs"

    def submission_finished(self, submission_id: str) -> str:
        return self.submission(submission_id) + ":finished"

    def claim(self, worker_id: str) -> str:
        return self._name("CLAIM") + worker_id

    def worker(self, worker_id: str) -> str:
        return self._name("WORKER") + worker_id

    def worker_adapters(self, worker_id: str) -> str:
        return self.worker(worker_id) + ":adapters"

    def _name(self, key: str) -> str:
        return self.prefix + KEY_NAMES[key]
