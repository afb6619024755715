"""Ctrl-C while a program starts or has ended: there is nothing to tidy up, and an exception that is
raised amid other people's imports comes out as a traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType

#: The exit code that a shell gives a program ended by Ctrl-C.
INTERRUPTED = 130


def end_at_once() -> None:
    """Let Ctrl-C end the process from now on, unless whoever started it lets Ctrl-C do nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def tidy_up_first() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
