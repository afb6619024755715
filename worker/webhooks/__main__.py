"""The console script ``notifier``, which imports nothing before it is ready for Ctrl-C."""

from __future__ import annotations

from broker.interrupts import end_at_once


def main() -> None:
    """Run the command; ends the process with its exit status."""
    end_at_once()
    from worker.webhooks import cli

    cli.main()


if __name__ == "__main__":
    main()
