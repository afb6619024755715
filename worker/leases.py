"""The jobs that this worker holds, from claim to commit."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from broker.claims import Claim, ClaimRequest, Lease


class Leases:
    """Shared by the threads that claim, renew and commit."""

    def __init__(
        self,
        *,
        max_jobs: int,
        max_adapters: int,
        pinned: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """``pinned`` names the adapters that hold a slot even when no job uses them."""
        self._max_jobs = self._most_aside = max_jobs
        self._max_adapters = max_adapters
        self._pinned = pinned
        self._lock = threading.Lock()
        self._held: dict[str, Claim] = {}
        self._jobs_by_adapter: Counter[str] = Counter()
        self._in_use_since: dict[str, float] = {}
        self._draining: str | None = None
        self._lost: set[Lease] = set()
        #: Set when a claim may bring what the last one did not: jobs have gone from here, so that
        #: there is room or a slot, or have come to the queue.
        self.may_claim = threading.Event()

    def limit(self, max_jobs: int) -> None:
        """Hold no more jobs than that from now on."""
        has_grown, self._max_jobs = max_jobs > self._max_jobs, max_jobs
        if has_grown:
            self.may_claim.set()

    def add(self, claims: Iterable[Claim]) -> None:
        with self._lock:
            for claim in claims:
                # A job that was lost, in a stall or a restart of the server, may come back.
                self._forget(claim.lease.job_id)
                self._held[claim.lease.job_id] = claim
                if claim.adapter:
                    self._jobs_by_adapter[claim.adapter] += 1
                    self._in_use_since.setdefault(claim.adapter, time.monotonic())

    def remove(self, leases: Iterable[Lease]) -> set[Lease]:
        """Forget jobs that were committed, handed back or lost; returns the leases that were held.

        A newer lease of the same job stays.
        """
        with self._lock:
            held = {lease for lease in leases if self._is_held(lease)}
            for lease in held:
                self._forget(lease.job_id)
        if held:
            self.may_claim.set()
        return held

    def lose(self, leases: Iterable[Lease]) -> set[Lease]:
        """``remove`` leases that the queue has taken back; ``take_lost`` tells the engine."""
        lost = self.remove(leases)
        with self._lock:
            self._lost |= lost
        return lost

    def lose_jobs(self, job_ids: Iterable[str]) -> set[Lease]:
        """``lose`` the leases of jobs, as far as they are held."""
        with self._lock:
            leases = [self._held[id_].lease for id_ in job_ids if id_ in self._held]
        return self.lose(leases)

    def take_lost(self) -> set[Lease]:
        """The leases that were lost since the last call."""
        if not self._lost:
            return set()
        with self._lock:
            lost, self._lost = self._lost, set()
        return lost

    def holds(self, lease: Lease) -> bool:
        with self._lock:
            return self._is_held(lease)

    def held(self) -> list[Lease]:
        with self._lock:
            return [claim.lease for claim in self._held.values()]

    def __len__(self) -> int:
        return len(self._held)

    def request(self, resident: Collection[str], being_read: Collection[str] = ()) -> ClaimRequest:
        """What can be claimed now beside what is held.

        Of adapters that are being read nothing is, and what is held of them takes no room from
        others, as long as that is not more than may be held.
        """
        # Asked for without the lock: who knows what is pinned may be asking what is held here.
        pinned = set(self._pinned())
        with self._lock:
            in_use = self._jobs_by_adapter.keys() | pinned
            num_aside = sum(self._jobs_by_adapter[name] for name in being_read)
            taken = len(self._held) - min(num_aside, self._most_aside)
            return ClaimRequest(
                num_jobs=max(0, self._max_jobs - taken),
                free_slots=max(0, self._max_adapters - len(in_use)),
                in_use=sorted(in_use.union(being_read)),
                draining=[*([self._draining] if self._draining else []), *being_read],
                resident=[name for name in resident if name not in in_use],
            )

    def drain_for(self, starving: str | None) -> str | None:
        """Let one adapter run out of jobs, so that a starving one finds its slot free.

        The choice falls on the one in use for longest. Returns it if it was chosen now.
        """
        pinned = set(self._pinned())
        with self._lock:
            candidates = self._in_use_since.keys() - pinned
            if not starving or self._draining or not candidates:
                return None
            self._draining = min(candidates, key=lambda name: self._in_use_since[name])
            return self._draining

    def adapters(self) -> list[str]:
        """Names of the adapters of the jobs that are held."""
        with self._lock:
            return list(self._jobs_by_adapter)

    def _is_held(self, lease: Lease) -> bool:
        claim = self._held.get(lease.job_id)
        return claim is not None and claim.lease == lease

    def _forget(self, job_id: str) -> None:
        claim = self._held.pop(job_id, None)
        if claim is None or claim.adapter is None:
            return
        adapter = claim.adapter
        self._jobs_by_adapter[adapter] -= 1
        if self._jobs_by_adapter[adapter] == 0:
            del self._jobs_by_adapter[adapter]
            del self._in_use_since[adapter]
            if self._draining == adapter:
                self._draining = None
