"""An adapter as the queue knows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

#: Letters, digits and ``. _ - /``, beginning with a letter or digit: safe in a key, a file name
#: and a shell, and never equal to ``schemas.keys.BASE``.
AdapterName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=128)
]

_NAMES = TypeAdapter[str](AdapterName)


def is_adapter_name(name: str) -> bool:
    try:
        _NAMES.validate_python(name)
    except ValidationError:
        return False
    return True


#: How an adapter is taken off the queue: its waiting jobs are finished first, or they fail.
Unloading = Literal["drain", "force"]


class AdapterVersion(BaseModel):
    """One state of the files of an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    revision: str


class AdapterRecord(BaseModel):
    """One field of the desired state ``{queue}:adapters``: what workers shall do with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Where it is read from, as the workers' file system names it."""
    revision: str | None = None
    """Hash of its configuration and weights; None until a worker has read it."""
    pinned: bool = False
    """Whether it shall keep a slot on every worker."""
    unloading: Unloading | None = None
    version: int = 0
    """That of the desired state when it was last loaded or announced: once it changes, the source
    is to be read again."""
    previous: AdapterVersion | None = None
    """What the last load is to replace: it is served until a worker has read the new source, so for
    good if none can."""
