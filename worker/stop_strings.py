"""Finds a stop string in an answer while it grows.

It is found with the token that completes it in the answer's text, as decoding the whole answer
gives it; only the last few tokens are decoded for that. Not so for a stop string that holds the
character U+FFFD, which stands for bytes that are no text: later bytes may change those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

#: Bytes of the longest character. A tokenizer may give each of them a token of its own.
_CHARACTER_BYTES = 4

#: What a decoder writes for bytes that are no character.
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class StopSearch:
    """Watches one answer. A stop string may begin and end inside tokens, so text is searched."""

    def __init__(
        self, stops: list[str], decode: Callable[[list[int]], str], min_tokens: int = 0
    ) -> None:
        """``decode`` is what makes the answer's text of its tokens. What the first ``min_tokens``
        of them complete is passed over."""
        self._stops = stops
        self._decode = decode
        self._num_to_ignore = min_tokens
        self._num_ignored = 0
        """Of ``_token_ids``."""
        self._token_ids: list[int] = []
        # A token is at least one byte of text; of the first, a decoder may strip a space.
        self._max_tokens = max(len(stop.encode()) for stop in stops) + 1

    def text_before_stop(self, token_id: int) -> str | None:
        """Add a token; returns the text up to the first stop string, or None if there is none."""
        self._num_to_ignore -= 1
        # Special tokens have no text. Twice, for a decoder strips the space that begins a text.
        if not self._decode([token_id, token_id]):
            return None
        self._token_ids.append(token_id)
        if self._num_to_ignore >= 0:
            self._num_ignored = len(self._token_ids)
            return None
        if not any(stop in text for text in self._last_texts() for stop in self._stops):
            return None
        text = self._decode(self._token_ids)
        num_ignored = self._num_ignored_characters()
        # The first one that ends behind what is ignored.
        places = [text.find(stop, max(0, num_ignored - len(stop) + 1)) for stop in self._stops]
        found = [place for place in places if place >= 0]
        return text[: min(found)] if found else None

    def _num_ignored_characters(self) -> int:
        """Those that the ignored tokens complete. A character that they begin leaves no trace in
        it, nor does it take the run of bytes before it along."""
        text = ""
        for end in range(self._num_ignored, max(0, self._num_ignored - _CHARACTER_BYTES), -1):
            text = self._decode(self._token_ids[:end])
            if not text.endswith(NO_CHARACTER):
                break
        return len(text.rstrip(NO_CHARACTER))

    def _last_texts(self) -> Iterator[str]:
        """The end of the answer, in which a stop string stands that the last token completed.

        Begun inside a character, it may lack more than that character: a decoder may take a run of
        bytes as a whole. So it is begun anew, until it begins with a character.
        """
        tail = self._token_ids[-(self._max_tokens + _CHARACTER_BYTES - 1) :]
        for start in range(_CHARACTER_BYTES):
            text = self._decode(tail[start:])
            yield text
            if not text.startswith(NO_CHARACTER):
                return
