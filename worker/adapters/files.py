"""The files of adapters, opened so that none of them can keep the reader waiting."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from schemas.errors import BadInput


def open_file(path: Path) -> io.BufferedReader:
    """Open a file for reading; raises OSError if that fails, BadInput if it is anything else.

    A named pipe would keep its reader waiting for a writer, for ever, and a device has no end.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadInput(f"{path}: is no regular file; put a file, or a link to one, in its place.")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
