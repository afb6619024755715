"""The paged KV cache: its memory, and who owns which page."""

from __future__ import annotations

import torch

from worker.model.config import ModelConfig

#: Tokens in a page. Small pages waste little at a sequence's end; 16 keys of one head are 2 KB or
#: more even in a small model, enough to copy at full speed.
PAGE_SIZE = 16


def num_pages(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class KVCache:
    """For each layer keys and values, each [pages, kv_heads, page_size, head_dim]."""

    def __init__(
        self, config: ModelConfig, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)

        def cache() -> torch.Tensor:
            # Zeros, since a masked key still counts as 0 * value, and 0 * NaN is NaN.
            return torch.zeros(shape, device=device, dtype=dtype)

        self.layers = [(cache(), cache()) for _ in range(config.num_layers)]


class PagePool:
    """Hands out pages by number. Every page is free or belongs to one owner."""

    def __init__(self, pages: int) -> None:
        self.num_pages = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages; the caller has seen that there are so many."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)
