"""The command ``notifier``. Its flags are called like the fetcher's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from worker.command import add_server_flags, awaited_server, new_parser, on_signal, run_command

DESCRIPTION = """\
Delivers the webhooks of a queue: posts to the URL of `producer submit --webhook URL`, once all
jobs of the submission have ended, a JSON object with their counts, signed as Standard Webhooks has
it. What is not answered by 2xx is tried again for a day, with growing pauses. The secret is whsec_
and the base64 of 24 to 64 bytes; while it is changed, a file may hold the new and the old one, a
line each. Needs neither GPU nor model. Ends with status 0 after SIGTERM or Ctrl-C, 2 for a wrong
flag or secret, 4 if the Redis server cannot be used.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = new_parser("notifier", DESCRIPTION)
    parser.add_argument(
        "--webhook-hosts",
        nargs="+",
        required=True,
        metavar="HOST",
        help="hosts that webhooks may go to: HOST, at port 443 or for http:// 80, or HOST:PORT",
    )
    parser.add_argument(
        "--webhook-secret-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="what webhooks are signed with (WEBHOOK_SECRET_FILE, WEBHOOK_SECRET)",
    )
    add_server_flags(parser)
    return parser


def main() -> None:
    """Run the command; ends the process with its exit status."""
    flags = build_parser().parse_args()
    run_command("notifier", lambda: _run(flags))


def _run(flags: argparse.Namespace) -> int:
    # Only now, since --help should not wait for it.
    from broker.connection import server_errors
    from worker.logs import configure_logs, mute_rq
    from worker.webhooks.notifier import Notifier
    from worker.webhooks.signature import read_secrets

    configure_logs()
    mute_rq()
    hosts = _hosts(flags.webhook_hosts)
    queue = _queue(flags.queue)
    secrets = read_secrets(flags.webhook_secret_file)
    with (
        awaited_server(flags.redis_url, flags.redis_password_file) as server,
        server_errors(server.url),
    ):
        notifier = Notifier(server.url, queue, hosts, secrets)
        on_signal(notifier.stop)
        notifier.run()
        return 0


def _hosts(given: list[str]) -> list[str]:
    from schemas.errors import BadInput
    from schemas.webhook import parse_webhook_host

    try:
        return [parse_webhook_host(text) for text in given]
    except ValueError as error:
        raise BadInput(f"--webhook-hosts {' '.join(given)}: {error}.") from None


def _queue(name: str) -> str:
    from schemas.errors import BadInput
    from schemas.keys import QUEUE_NAME

    if not re.fullmatch(QUEUE_NAME, name):
        raise BadInput(f"--queue {name}: use up to 64 letters, digits and . _ -")
    return name


if __name__ == "__main__":
    main()
