"""Structured logs: colours on a terminal, one JSON object a line elsewhere. Never a prompt."""

from __future__ import annotations

import sys

import structlog
from structlog.typing import Processor

log = structlog.get_logger()


def configure_logs() -> None:
    """Send all logs to standard error."""
    on_terminal = sys.stderr.isatty()
    render = structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer()
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if on_terminal else "iso"),
    ]
    if not on_terminal:
        processors.append(structlog.processors.dict_tracebacks)
    structlog.configure(
        processors=[*processors, render],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
