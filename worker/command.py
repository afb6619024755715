"""What the commands ``worker``, ``fetcher`` and ``notifier`` share: flags, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from broker.interrupts import INTERRUPTED, end_at_once, tidy_up_first
from broker.release import release
from schemas.errors import LorryError

if TYPE_CHECKING:
    from broker.server import Server


def new_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with ``--version``. A flag that is left out and has no default is not in what it
    makes, so that a config can fill it in."""
    parser = argparse.ArgumentParser(
        prog=command,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--version", action="version", version=release(), help="show the version and exit"
    )
    return parser


def add_server_flags(flags: argparse._ActionsContainer) -> None:
    """Those that say which queue it is, on which server."""
    flags.add_argument("--queue", default="lorry", metavar="NAME", help="name of the queue (lorry)")
    flags.add_argument(
        "--redis-url",
        default=None,
        metavar="URL",
        help="Redis or Valkey server (REDIS_URL; with neither, an embedded server)",
    )
    flags.add_argument(
        "--redis-password-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="its password (REDIS_PASSWORD_FILE, REDIS_PASSWORD, or in the URL)",
    )


def run_command(command: str, run: Callable[[], int]) -> NoReturn:
    """End the process with the status that ``run`` returns, or with that of a LorryError, which is
    told on stderr."""
    from worker.daemons import end_process

    # While it starts up, SIGTERM ends it as Ctrl-C does: in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        tidy_up_first()
        status = run()
    except LorryError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        end_at_once()
    end_process(status)


def on_signal(stop: Callable[[], None]) -> None:
    """Let SIGTERM and Ctrl-C call ``stop`` from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


@contextmanager
def awaited_server(url: str | None, password_file: Path | None) -> Iterator[Server]:
    """The server that the flags, or the environment, name, once it answers."""
    # Only now, since --help should not wait for it.
    from broker.address import has_password
    from broker.server import find_server
    from worker.background import wait_for_server
    from worker.logs import log

    with find_server(url, password_file) as server:
        if has_password(url):
            log.warning("password_on_command_line", remedy="REDIS_URL, or a password file")
        wait_for_server(server)
        yield server
