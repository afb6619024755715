"""How the C library treats memory that the engine frees on a CPU."""

from __future__ import annotations

import ctypes

#: From malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

#: Activations of a batch are some tens of MB and are the same in every step.
_KEPT_BYTES = 1 << 30
_MMAP_BYTES = 32 << 20  # The largest that glibc takes.


def keep_freed_memory() -> None:
    """Keep freed activations for the next step instead of giving them back to the kernel.

    Otherwise every step faults its pages in anew: 133 ms against 117 ms a decode step of 48
    sequences of SmolLM2-135M (float32, 2 cores). Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, 2 * _MMAP_BYTES)
