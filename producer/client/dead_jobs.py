"""The jobs that were given up on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from broker.dead_letters import DeadLetter
from producer import advice
from producer.client.session import Session
from schemas.errors import (
    BadInput,
)
from schemas.result import Attempt


class DeadJobs(Session):
    """Reads, replays and drops them."""

    def attempts(self, job_id: str) -> list[Attempt]:
        """How the attempts of a job ended that brought no result, from the first one on; none if
        its first attempt was its last."""
        with self._errors():
            return self._dead_letters.attempts(job_id)

    def dead_letters(self, *ids: str) -> Iterator[DeadLetter]:
        """The jobs given up on, of the jobs and submissions, or without ids all of the queue, those
        given up first in front. Raises UnknownId before the first."""
        with self._errors():
            wanted = {id_: self._is_submission(id_) for id_ in ids}
            for letter in self._dead_letters.all():
                if not ids or not wanted.keys().isdisjoint([letter.job_id, *letter.submissions]):
                    yield letter

    def replay_dead(self, *ids: str) -> int:
        """Let dead jobs run again with a fresh count of attempts, and keep their history; a
        submission's id stands for all its dead jobs. Returns their number.

        Raises UnknownId, and BadInput if one of the jobs is no dead letter; nothing was done then.
        """
        with self._errors():
            return self._dead_letters.replay(self._dead_job_ids(ids))

    def drop_dead(self, *ids: str) -> int:
        """Take jobs off the dead letters, as ``replay_dead`` does, and let them be: their results
        still say why they were given up."""
        with self._errors():
            return self._dead_letters.drop(self._dead_job_ids(ids))

    def _dead_job_ids(self, ids: Sequence[str]) -> list[str]:
        """Of jobs and submissions; raises BadInput for a job that is no dead letter."""
        if not ids:
            return []
        found = [letter.job_id for letter in self.dead_letters(*ids)]
        jobs = [id_ for id_ in dict.fromkeys(ids) if not self._is_submission(id_)]
        alive = [result for result in self._reader.results(jobs) if result.id not in found]
        if alive:
            states = advice.listed([f"'{result.id}' ({result.status})" for result in alive])
            raise BadInput(
                f"Not among the dead jobs of queue '{self.queue}': {states}."
                " `producer dead list` shows them."
            )
        return found
