"""Which names regular expressions match; as a program, in a process that may be ended.

``re`` lets no other thread run while it matches, and takes longer than anybody lives for some
expressions. Nothing that has to be installed is imported: the program starts in 20 ms.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterator, Sequence

#: For each name that a pattern is the first to match: what its group ``idx`` holds, if it has one.
Found = dict[str, str | None]

#: A program that needs more memory than that ends.
_MAX_BYTES = 1 << 28


def first_matches(patterns: Sequence[str], whole: bool, names: Sequence[str]) -> Iterator[Found]:
    """What each of the patterns is the first to match; ``whole``: whole names, not beginnings.

    Raises ValueError for one that is no regular expression, once it is its turn.
    """
    left = list(names)
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from error
        match = compiled.fullmatch if whole else compiled.match
        matches = {name: found for name in left if (found := match(name))}
        left = [name for name in left if name not in matches]
        yield {name: found.groupdict().get("idx") for name, found in matches.items()}


def _main(seconds: float) -> None:
    """Read questions, and write a line for each pattern: what it has found, or what is wrong."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    most = _MAX_BYTES if most == resource.RLIM_INFINITY else min(_MAX_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # Of time in which it computes, so that on a busy machine no more is given up than elsewhere.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    questions, names = json.load(sys.stdin)
    for patterns, whole in questions:
        try:
            for found in first_matches(patterns, whole, names):
                print(json.dumps(found), flush=True)
        except ValueError as error:
            print(json.dumps(str(error)), flush=True)
            return


if __name__ == "__main__":
    _main(float(sys.argv[1]))
