"""Finds a stop string in an answer while it grows."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopSearch:
    """Watches one answer. A stop string may begin and end inside tokens, so text is searched."""

    def __init__(self, stops: list[str], tokenizer: Tokenizer) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._overlap = max(len(stop) for stop in stops) - 1
        self._text = ""

    def text_before_stop(self, token_id: int) -> str | None:
        """Add a token; returns the text up to the first stop string, or None if there is none."""
        searched_from = max(0, len(self._text) - self._overlap)
        self._text += self._stream.step(self._tokenizer, token_id) or ""
        found = [self._text.find(stop, searched_from) for stop in self._stops]
        positions = [position for position in found if position >= 0]
        return self._text[: min(positions)] if positions else None
