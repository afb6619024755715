"""Who owns which page of the KV cache, and which pages hold a prefix that others may share."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from itertools import takewhile

#: Bytes of a prefix key. Two prefixes that met in one would silently share keys and values; among
#: 2^40 pages ever named the odds of that are 2^-49.
_KEY_BYTES = 16


def prefix_keys(revision: str | None, token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each page that the tokens fill, for the tokens up to that page's end.

    Each is a hash of the one before and of its own page's tokens, and the first of the adapter's
    revision (None: the base model): equal keys mean equal keys and values in the cache.
    """
    key = _digest(b"base" if revision is None else b"adapter " + revision.encode())
    tokens = memoryview(array("q", token_ids)).cast("B")
    page_bytes = 8 * page_size
    keys = []
    for end in range(page_bytes, len(tokens) + 1, page_bytes):
        key = _digest(key, tokens[end - page_bytes : end])
        keys.append(key)
    return keys


def _digest(*parts: bytes | memoryview) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=_KEY_BYTES).digest()


class PagePool:
    """Hands out pages by number. A page has owners, or is free.

    A page that is full gets the key of the prefix that ends with it, and every sequence with that
    prefix may become one of its owners. Without owners it keeps its key and contents until the
    room is needed: the longest unused goes first.
    """

    def __init__(self, pages: int) -> None:
        self.num_pages = pages
        self._empty = list(range(pages - 1, -1, -1))
        """Free pages without a key, the next to be handed out last."""
        self._unused: dict[int, None] = {}
        """Free pages with a key, the longest unused first."""
        self._num_owners = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._new: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages with one owner each; the caller has seen that there are so many."""
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} free")
        pages = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        self._new += pages
        return pages

    def take_new(self) -> list[int]:
        """Pages that have been handed out since the last call."""
        new, self._new = self._new, []
        return new

    def free(self, pages: list[int]) -> None:
        """One owner gives back his pages, which stand in the order of his tokens."""
        # Of a prefix the end goes first: without its beginning nobody finds it.
        for page in reversed(pages):
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._empty.append(page)

    def name(self, page: int, key: bytes) -> None:
        """From now on ``page`` can be found: batches launched later find its contents there."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest prefix that is known; they have no further owner by that."""
        return [self._page_of[key] for key in takewhile(self._page_of.__contains__, keys)]

    def num_free_without(self, pages: list[int]) -> int:
        """Free pages that are left once ``pages``, found just now, have an owner."""
        return self.num_free - sum(not self._num_owners[page] for page in pages)

    def share(self, pages: list[int]) -> None:
        """Let pages, found just now, have one more owner."""
        for page in pages:
            self._num_owners[page] += 1
            self._unused.pop(page, None)

    def forget(self) -> None:
        """Let no page be found any more, since batches that were to fill some did not run."""
        self._empty += self._unused
        self._unused.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _evict(self) -> int:
        page = next(iter(self._unused))
        del self._unused[page]
        del self._page_of[self._key_of.pop(page)]
        return page
