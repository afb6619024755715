"""What the C library and Python do with the memory of a worker's process."""

from __future__ import annotations

import ctypes
import gc

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


def leave_alone_what_stays() -> None:
    """Spare the garbage collector all objects that there are by now; to be called once, by a
    process that has loaded what it keeps to its end.

    A full collection goes through the 250,000 objects that come with torch, 0.2 s each time, and
    jobs by the thousand cause many: beside an engine that computes nothing they took a third of the
    time for which threads held the interpreter.
    """
    gc.collect()
    gc.freeze()
