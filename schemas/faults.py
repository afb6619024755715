"""What pydantic finds wrong, in words for a person."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # The producer's command line answers mistakes before it needs pydantic.
    from pydantic import ValidationError

#: How pydantic begins what a validator of ours raised.
_OURS = "Value error, "


def plain(message: str) -> str:
    """A message of pydantic's, to follow the name of what it is about: "should be a number"."""
    if message.startswith(_OURS):
        return message.removeprefix(_OURS)
    what = re.sub(r"^\w+ should ", "should ", message)
    return what[:1].lower() + what[1:].replace(" after validation", "")


def place_of(loc: Sequence[int | str]) -> str:
    """("messages", 1, "role") -> "messages[1].role"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".")


def first_fault(error: ValidationError) -> str:
    """The first of the faults: "messages[1].role: should be a string"; the input is not shown."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join(filter(None, [place_of(fault["loc"]), plain(fault["msg"])]))
