"""The command ``python -m benchmarks.soak``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks import soak as soak_package
from benchmarks.fault_bench import LEASE_SECONDS
from benchmarks.soak import report
from benchmarks.soak.player import run


def main() -> None:
    """Run the soak and print its tables."""
    parser = argparse.ArgumentParser(
        description=soak_package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for logs, to be kept")
    flags = parser.parse_args()
    console = Console(width=110)
    with ExitStack() as stack:
        folder = flags.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="lorry-soak-"))
        )
        soak = run(flags.seed, 60 * flags.minutes, folder)
        console.print(
            f"seed {flags.seed}, {flags.minutes:g} minutes, leases of {LEASE_SECONDS:g} s"
        )
        console.print(report.fault_table(soak))
        console.print(report.command_table(soak))
        console.print(report.outcome_table(soak))
    for text in soak.recoveries.slow:
        console.print(text, soft_wrap=True)
    for violation in soak.violations:
        console.print(violation, style="red", soft_wrap=True)
    sys.exit(1 if soak.violations else 0)


if __name__ == "__main__":
    main()
