"""The command ``worker`` in a forked process.

By itself, since a process that is forked for it imports what this module does: PEFT would take it
two seconds.
"""

from __future__ import annotations

import sys

from worker import cli


def run_command(*flags: str) -> None:
    """Run it with these flags, and end this process with its exit status."""
    sys.argv = ["worker", *flags]
    cli.main()
