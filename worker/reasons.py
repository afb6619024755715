"""Reasons why something is refused, as they are kept: others read them, in tables and in JSON."""

from __future__ import annotations

#: Of a reason that is kept. What was given is part of it, and may be anything.
_MAX_CHARACTERS = 500

#: Of a value that is shown in one.
_MAX_SHOWN = 100


def kept(reason: str) -> str:
    """The reason in one line that can be written everywhere, and is not too long to read."""
    # Cut first: of a long one no more is looked at than is shown.
    return _cut(_printable(reason[: 2 * _MAX_CHARACTERS]), _MAX_CHARACTERS)


def shown(value: object) -> str:
    """A value that somebody gave, short enough to stand in a sentence."""
    text = value if isinstance(value, str) else repr(value)
    return _cut(text, _MAX_SHOWN)


def _printable(text: str) -> str:
    """Without line breaks, and with escapes for what no terminal shows and no encoding knows."""
    joined = " ".join(text.split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
