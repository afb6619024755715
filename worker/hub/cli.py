"""The command ``fetcher``. Its flags are called like the worker's."""

from __future__ import annotations

import argparse
import os

from worker.command import add_server_flags, awaited_server, new_parser, on_signal, run_command

DESCRIPTION = """\
Fetches adapters from the Hugging Face hub for the workers of a queue that share its cache folder
(HF_HOME): takes what `producer lora load NAME OWNER/NAME[@REVISION]` asks for, downloads and
validates it, and lets the workers load it. Needs no GPU. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
are honoured. Ends with status 0 after SIGTERM or Ctrl-C, 1 after a failure, 2 for a wrong flag or
model, 4 if the Redis server cannot be used.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = new_parser("fetcher", DESCRIPTION)
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
    add_server_flags(parser)
    # For `worker --with-fetcher`: a worker that is killed must not leave its fetcher behind.
    parser.add_argument("--end-with", type=int, metavar="PID", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run the command; ends the process with its exit status."""
    flags = build_parser().parse_args()
    run_command("fetcher", lambda: _run(flags))


def _run(flags: argparse.Namespace) -> int:
    # Only now, since importing torch takes seconds and --help should not.
    from huggingface_hub.utils import logging as hub_logging

    from broker.connection import server_errors
    from worker.adapters.loader import AdapterChecker
    from worker.config import FetcherConfig
    from worker.hub.fetcher import Fetcher
    from worker.logs import configure_logs, mute_rq
    from worker.model.config import ModelConfig
    from worker.model_place import find_model

    configure_logs()
    mute_rq()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = find_model(flags.model_path)
    config = FetcherConfig.from_flags({**vars(flags), "model_path": model.folder})
    checker = AdapterChecker(
        ModelConfig.from_folder(config.model_path),
        config.max_lora_rank,
        config.lora_target_modules,
    )
    with (
        awaited_server(config.redis_url, config.redis_password_file) as server,
        server_errors(server.url),
    ):
        fetcher = Fetcher(server.url, config.queue, config.hub_owners, checker)
        on_signal(fetcher.stop)
        return fetcher.run(lambda: config.end_with is not None and os.getppid() != config.end_with)


if __name__ == "__main__":
    main()
