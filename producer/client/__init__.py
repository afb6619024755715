"""The Python client of a queue.

from producer.client import Client

with Client() as client:
    submission = client.submit(["Hello", {"prompt": "How many users?", "lora": "sql"}])
    for result in client.follow(submission):
        print(result.id, result.text)
"""

from __future__ import annotations

from producer.client.adapters import Adapters
from producer.client.controls import Controls
from producer.client.dead_jobs import DeadJobs
from producer.client.queue_state import QueueState
from producer.client.results import Results
from producer.client.submissions import Submissions


class Client(Submissions, Results, DeadJobs, Controls, Adapters, QueueState):
    """One queue on one server; a context manager. A thread needs a client of its own.

    Every method raises ServerUnavailable if the server cannot be reached or refuses a command.
    """
