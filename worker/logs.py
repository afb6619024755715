"""Structured logs: colours on a terminal, one JSON object a line elsewhere. Never a prompt."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import ExceptionRenderer, JSONRenderer, TimeStamper, add_log_level
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

log = structlog.get_logger()


def configure_logs() -> None:
    """Send all logs to standard error."""
    # An exception is told without local variables: prompts are among them, and the server's URL.
    if sys.stderr.isatty():
        processors: list[Processor] = [
            TimeStamper(fmt="%H:%M:%S"),
            ConsoleRenderer(exception_formatter=plain_traceback),
        ]
    else:
        processors = [
            TimeStamper(fmt="iso"),
            ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            JSONRenderer(),
        ]
    structlog.configure(
        processors=[add_log_level, *processors],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def mute_rq() -> None:
    """Keep back what rq would say: it is in the program's own lines, one JSON object each."""
    logging.getLogger("rq").addHandler(logging.NullHandler())
    logging.getLogger("rq").propagate = False
