"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds until an expected thing must have happened, on a machine that is busy with other things.
PATIENCE = 240.0


def wait_until(is_so: Callable[[], bool], what: str = "it did not happen") -> None:
    """Return once it is so; raises TimeoutError(``what``) after ``PATIENCE``."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)
