"""What can go wrong with the hub and its cache, told with the remedy."""

from __future__ import annotations

import errno

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from schemas.errors import BadInput, LorryError
from schemas.hub import HubSource

#: Client errors that say nothing about the request: too slow, too early, too many.
_PASSING_STATUS = (408, 425, 429)

_READ_ONLY = (errno.EACCES, errno.EROFS, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class HubUnavailable(LorryError):
    """The hub, the network or the disk failed in a way that may pass."""


def not_cached(source: HubSource, remedy: str, reason: str = "") -> BadInput:
    """The hub cache lacks it, or a part of it for a ``reason``, and the hub is not asked."""
    offline = " and HF_HUB_OFFLINE forbids to ask the hub" if constants.is_offline_mode() else ""
    return BadInput(
        f"{source} is not in the hub cache {constants.HF_HUB_CACHE} of this machine{offline}"
        f"{': ' + reason if reason else '.'} {remedy}"
    )


def explained(source: HubSource, error: Exception) -> LorryError:
    """What huggingface_hub raised: BadInput for what stays as it is until a person changes
    something, HubUnavailable for what may pass."""
    if isinstance(error, HfHubHTTPError):
        return _answered(source, error)
    if isinstance(error, OSError) and error.errno in _READ_ONLY:
        return BadInput(
            f"{source}: the hub cache cannot be written: {error.strerror} ({error.filename})."
            " Let this user write it, or name another by HF_HOME."
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        return HubUnavailable(
            f"{source}: the disk of the hub cache {constants.HF_HUB_CACHE} is full."
        )
    # What else may come is of the HTTP library's own tree, which changes with huggingface_hub.
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return _download_failed(source, cause)


def _answered(source: HubSource, error: HfHubHTTPError) -> LorryError:
    """The hub has answered, with an error."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return BadInput(
            f"{source}: the repository is gated. Accept its terms on the hub, and give a token"
            " of that account (HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return BadInput(f"{source}: the repository has no revision '{source.revision or 'main'}'.")
    if isinstance(error, EntryNotFoundError):
        return BadInput(f"{source}: a file is missing in the repository.")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return BadInput(
            f"{source}: the hub at {constants.ENDPOINT} has no such repository, or it is private"
            f" and needs a token that may read it (HF_TOKEN); it answered {status}."
        )
    if 400 <= status < 500 and status not in _PASSING_STATUS:
        return BadInput(f"{source}: the hub refused the request: {_first_line(error)}")
    return _download_failed(source, error)


def _download_failed(source: HubSource, error: Exception) -> HubUnavailable:
    return HubUnavailable(
        f"{source}: the download from {constants.ENDPOINT} failed: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
