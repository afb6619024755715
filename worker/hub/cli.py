"""The command ``fetcher``. Its flags are called like the worker's."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from broker.interrupts import INTERRUPTED, end_at_once, tidy_up_first

DESCRIPTION = """\
Fetches adapters from the Hugging Face hub for the workers of a queue that share its cache folder
(HF_HOME): takes what `producer lora load NAME OWNER/NAME[@REVISION]` asks for, downloads and
validates it, and lets the workers load it. Needs no GPU. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
are honoured. Ends with status 0 after SIGTERM or Ctrl-C, 1 after a failure, 2 for a wrong flag or
model, 4 if the Redis server cannot be used.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(prog="fetcher", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--model-path",
        required=True,
        metavar="MODEL",
        help="folder of the base model, of which config.json is enough, or its repository on the"
        " hub, OWNER/NAME[@REVISION]",
    )
    parser.add_argument(
        "--hub-owners",
        nargs="+",
        required=True,
        metavar="OWNER",
        help="users and organizations of the hub whose repositories may be fetched",
    )
    parser.add_argument("--max-lora-rank", type=int, metavar="N", help="largest rank (any)")
    parser.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="MODULE",
        help="modules that adapters may change, or all (all)",
    )
    parser.add_argument(
        "--queue", default="lorry", metavar="NAME", help="name of the queue (lorry)"
    )
    parser.add_argument(
        "--redis-url",
        metavar="URL",
        help="Redis or Valkey server (REDIS_URL; with neither, an embedded server)",
    )
    parser.add_argument(
        "--redis-password-file",
        type=Path,
        metavar="FILE",
        help="its password (REDIS_PASSWORD_FILE, REDIS_PASSWORD, or in the URL)",
    )
    # For `worker --with-fetcher`: a worker that is killed must not leave its fetcher behind.
    parser.add_argument("--end-with", type=int, metavar="PID", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run the command; ends the process with its exit status."""
    flags = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        sys.exit(_run(flags))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        end_at_once()


def _run(flags: argparse.Namespace) -> int:
    # Only now, since importing torch takes seconds and --help should not.
    from huggingface_hub.utils import logging as hub_logging

    from broker.address import has_password
    from broker.connection import server_errors
    from broker.server import find_server
    from schemas.errors import LorryError
    from worker.adapters.loader import AdapterChecker
    from worker.background import wait_for_server
    from worker.config import FetcherConfig
    from worker.hub.fetcher import Fetcher
    from worker.logs import configure_logs, log, mute_rq
    from worker.model.config import ModelConfig
    from worker.model_place import find_model

    tidy_up_first()
    configure_logs()
    mute_rq()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model = find_model(flags.model_path)
        config = FetcherConfig.from_flags({**vars(flags), "model_path": model.folder})
        checker = AdapterChecker(
            ModelConfig.from_folder(config.model_path),
            config.max_lora_rank,
            config.lora_target_modules,
        )
        with find_server(config.redis_url, config.redis_password_file) as server:
            if has_password(config.redis_url):
                log.warning("password_on_command_line", remedy="REDIS_URL, or a password file")
            wait_for_server(server)
            with server_errors(server.url):
                fetcher = Fetcher(server.url, config.queue, config.hub_owners, checker)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: fetcher.stop())
                return fetcher.run(
                    lambda: config.end_with is not None and os.getppid() != config.end_with
                )
    except LorryError as error:
        print(f"fetcher: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    main()
