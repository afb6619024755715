"""An adapter as the queue knows it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

#: Letters, digits and ``. _ - /``, beginning with a letter or digit: safe in a key, a file name
#: and a shell, and never equal to ``schemas.keys.BASE``.
AdapterName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=128)
]


class AdapterRecord(BaseModel):
    """One field of the desired state ``{queue}:adapters``: where an adapter comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    revision: str
    pinned: bool = False
