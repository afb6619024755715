"""Redis 7.0 writes the -0 of Lua as "-0", which its commands do not take for an integer."""

from __future__ import annotations

import pytest

from broker import scripts
from broker.connection import connect
from broker.job_queue import JobQueue
from schemas.job import Job
from tests.test_job_queue import claim, jobs, join, result, submit

#: Before a script: what is called with -0 fails, whatever the server is.
_REFUSES_MINUS_ZERO = """
local server = redis
local redis = setmetatable({}, { __index = server })
for _, name in ipairs({ 'call', 'pcall' }) do
  redis[name] = function(...)
    for _, argument in ipairs({ ... }) do
      if argument == 0 and 1 / argument < 0 then error('-0 in ' .. table.concat({ ... }, ' ')) end
    end
    return server[name](...)
  end
end
"""


@pytest.fixture
def queue(redis_url: str, queue_name: str, monkeypatch: pytest.MonkeyPatch) -> JobQueue:
    text = scripts.script_text
    monkeypatch.setattr(scripts, "script_text", lambda name: _REFUSES_MINUS_ZERO + text(name))
    return JobQueue(connect(redis_url, queue_name), queue_name)


def test_a_claim_passes_over_a_lane_whose_jobs_all_run(queue: JobQueue) -> None:
    join(queue)
    submit(queue, jobs(2))
    running = claim(queue, 2)  # As many as it asked for: there may be more.
    assert claim(queue, 2) == []
    recorded = queue.commit("w", [(job.lease, result(job)) for job in running])
    assert recorded == [True, True]


def test_a_claim_passes_over_what_brings_no_job(queue: JobQueue) -> None:
    join(queue)
    submit(queue, [Job(id="late", prompt="x", deadline="2020-01-01T00:00:00Z")], "late")
    submit(queue, jobs(2, "a"), "deleted")
    queue.client.delete(*(queue.keys.job(job.id) for job in jobs(2, "a")))
    queue.client.delete(queue.keys.submission("deleted"))
    submit(queue, [Job(id="good", prompt="x")], "good")
    assert [job.lease.job_id for job in claim(queue)] == ["good"]
