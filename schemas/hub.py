"""Adapters on the Hugging Face hub: how they are named, and how far their fetching is."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

#: What stands before a repository where a folder might be meant, and in every record.
HUB_PREFIX = "hf:"

#: The hub's own rules for names, without what could climb out of a cache folder.
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_SOURCE = re.compile(
    rf"(?P<owner>{_NAME})/(?P<name>{_NAME})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/+-]*))?"
)
_MAX_NAME, _MAX_REVISION = 96, 200
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: The rq queue of one Lorry queue is called so, and the queue's name: a server may hold several
#: queues, each with a model of its own, and rq's keys know nothing of that.
RQ_QUEUE_PREFIX = "adapters:"

#: The one function that a fetcher runs. rq jobs name it; nobody imports it by that name.
FETCH_FUNCTION = "lorry.fetch_adapter"

#: Seconds before each further try of a fetch that failed for a reason that may pass.
FETCH_BACKOFF = (5, 20, 60, 180)

#: Seconds after which one try of a fetch is given up.
FETCH_TIMEOUT = 3600

#: Seconds for which rq keeps its record of a fetch that has ended.
FETCH_KEPT = 86400


class HubSource(BaseModel):
    """A repository on the hub, at a branch, a tag or a commit; main if none is named."""

    model_config = ConfigDict(frozen=True)

    owner: str
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSource | None:
        """Read ``owner/name[@revision]``, with or without ``hf:`` before; None if it is no such."""
        found = _SOURCE.fullmatch(text.removeprefix(HUB_PREFIX))
        if not found:
            return None
        repo, revision = f"{found['owner']}/{found['name']}", found["revision"] or ""
        climbs = ".." in repo or ".." in revision or "//" in revision
        if climbs or "--" in repo or len(repo) > _MAX_NAME or len(revision) > _MAX_REVISION:
            return None
        if found["name"].endswith(".git") or revision.endswith(("/", ".", ".lock")):
            return None
        return cls(**found.groupdict())

    @property
    def repo(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    def at(self, revision: str) -> HubSource:
        return self.model_copy(update={"revision": revision})

    def __str__(self) -> str:
        """As records write it: ``hf:owner/name[@revision]``."""
        return f"{HUB_PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


class FetchRecord(BaseModel):
    """One field of ``{queue}:fetches``: the newest request to fetch an adapter of that name."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    """Of the request, and of its rq job."""
    source: str
    """As it was asked for: ``hf:owner/name[@revision]``."""
    pinned: bool = False
    """Whether the adapter shall keep a slot on every worker."""
    error: str | None = None
    """Why it was given up."""
    version: int | None = None
    """Of the desired state in which it was loaded."""

    @property
    def is_over(self) -> bool:
        return self.error is not None or self.version is not None


FetchState = Literal["queued", "downloading", "validating", "retrying", "failed", "loaded"]


class FetchProgress(BaseModel):
    """What a fetcher notes in the ``meta`` of the rq job."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: Literal["queued", "downloading", "validating", "retrying"] = "queued"
    done_bytes: int = 0
    total_bytes: int = 0
    attempt: int = 1
    """Of how many tries this is; of the next one while ``retrying``."""
    retry_at: float | None = None
    """The moment of the next try, in seconds since 1970, while ``retrying``."""
    reason: str | None = None
    """Why the last try failed."""
