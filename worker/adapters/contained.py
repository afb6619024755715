"""What goes wrong with one adapter stays with it: the worker goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from schemas.errors import BadInput, LorryError

log = structlog.get_logger()


@contextmanager
def contained(name: str) -> Iterator[None]:
    """What nobody foresaw in reading an adapter is BadInput too; the log has the traceback.

    As the adapter stays desired, every worker that ended of it would end again when it is started.
    """
    try:
        yield
    except LorryError:
        raise
    except Exception as error:
        log.exception("adapter_reading_failed", adapter=name)
        raise BadInput(
            f"reading it failed ({type(error).__name__}); the worker's log has the traceback."
        ) from error
