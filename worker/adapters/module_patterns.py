"""The regular expressions of an adapter's config, matched as ``re`` does, within a bounded time.

By ``re`` in a process of its own, unless they are plain: PEFT matches with it, and no other library
takes exactly its language in bounded time and memory (``regex``, which has a time limit, needs
gigabytes to compile ``((a{1000}){1000}){1000}``).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import structlog

from schemas.errors import BadInput
from worker.adapters import pattern_process
from worker.adapters.pattern_process import Found, first_matches
from worker.reasons import shown

log = structlog.get_logger()

#: What has no repetition and no alternatives, of which ``re`` tries each at most once at a place.
_PLAIN = re.compile(r"[^*+?{|(]*")

#: Plain patterns, and their characters, that are matched here; more take a second, too.
_MAX_PLAIN, _MAX_PLAIN_CHARACTERS = 2000, 100_000

#: Seconds of computing in which all patterns of an adapter must be matched; those of an honest
#: one take milliseconds.
_SECONDS = 1.0

#: Seconds after which that is given up, however little of them the process had.
_PATIENCE = 30.0


@dataclass(frozen=True)
class PatternSetting:
    """Patterns of one setting; the first that matches a name counts."""

    name: str
    given: tuple[str, ...]
    """As the config has them."""
    template: str
    """What PEFT puts each into."""
    whole: bool
    """Whether they must match whole names, not beginnings."""

    @property
    def used(self) -> list[str]:
        return [self.template.format(pattern) for pattern in self.given]


@dataclass(frozen=True)
class PatternMatch:
    """The first pattern that matches a name."""

    pattern: str
    """As the config has it."""
    layer: str | None
    """What its group ``idx`` holds."""


#: By setting and name.
Matches = dict[str, dict[str, PatternMatch]]


class _GivenUp(Exception):
    """Some pattern could not be matched within the bounds."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        """Of those of all settings."""


def match_names(path: Path, settings: Sequence[PatternSetting], names: Sequence[str]) -> Matches:
    """What each setting's patterns match.

    Raises BadInput, naming the setting and pattern, for one that is no regular expression or
    takes too long.
    """
    patterns = [(setting, given) for setting in settings for given in setting.given]
    try:
        answers = _answers(tuple(settings), tuple(names))
    except _GivenUp as error:
        setting, given = patterns[error.number]
        raise BadInput(
            f"{path}: {setting.name}: '{shown(given)}' takes too long to match, or too much memory;"
            f" all patterns of an adapter have {_SECONDS:g} s. Write it without repetitions inside"
            " of repetitions, or name the modules."
        ) from None
    matches: Matches = {setting.name: {} for setting in settings}
    for (setting, given), found in zip(patterns, answers, strict=False):
        if isinstance(found, str):
            used = shown(setting.template.format(given))
            raise BadInput(f"{path}: {setting.name}: '{used}' is no regular expression: {found}.")
        for name, layer in found.items():
            matches[setting.name][name] = PatternMatch(given, layer)
    return matches


def _answers(
    settings: tuple[PatternSetting, ...], names: tuple[str, ...]
) -> tuple[Found | str, ...]:
    """For each pattern what it has found; what is wrong with one is the last answer."""
    given = [pattern for setting in settings for pattern in setting.given]
    is_short = len(given) <= _MAX_PLAIN and sum(map(len, given)) <= _MAX_PLAIN_CHARACTERS
    if is_short and all(map(_PLAIN.fullmatch, given)):
        return tuple(_match_here(settings, names))
    return _match_elsewhere(settings, names)


def _match_here(settings: Sequence[PatternSetting], names: Sequence[str]) -> Iterator[Found | str]:
    try:
        for setting in settings:
            yield from first_matches(setting.used, setting.whole, names)
    except ValueError as error:
        yield str(error)


# Many adapters have the patterns of one recipe, and each is read again after it was evicted.
@lru_cache(maxsize=64)
def _match_elsewhere(
    settings: tuple[PatternSetting, ...], names: tuple[str, ...]
) -> tuple[Found | str, ...]:
    questions = [(setting.used, setting.whole) for setting in settings]
    program = subprocess.Popen(
        [sys.executable, "-I", "-S", pattern_process.__file__, str(_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C is not for it.
    )
    with program:
        try:
            told = program.communicate(json.dumps((questions, names)).encode(), timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            program.kill()
            told = program.communicate()
    output, complaint = told
    # What stands behind the last line's end was being written when the process ended.
    answers = tuple(json.loads(line) for line in output.split(b"\n")[:-1])
    has_ended = len(answers) == sum(len(setting.given) for setting in settings)
    if not has_ended and not (answers and isinstance(answers[-1], str)):
        last_words = complaint[-200:].decode(errors="replace")
        log.warning("patterns_given_up", status=program.returncode, error=last_words)
        raise _GivenUp(len(answers))
    return answers
