"""Quantities as they are typed: how long, until when, how much."""

from __future__ import annotations

import re
from datetime import datetime

from schemas.errors import BadInput

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}

_SIZE = re.compile(r"(\d+)([KMG]?)", re.ASCII)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.ASCII)


def parse_duration(text: str, flag: str) -> float:
    """ "90", "90s", "15m", "12h" or "7d" in seconds; raises BadInput that names the flag."""
    if found := _DURATION.fullmatch(text.strip()):
        return float(found[1]) * _UNITS[found[2]]
    raise BadInput(f"{flag} '{text}': write seconds, or a number with s, m, h or d (90, 15m, 7d).")


def parse_deadline(text: str) -> float | str:
    """A job's ``deadline``: a duration in seconds, or a moment in ISO 8601, which is by the local
    clock where it names no other. Raises BadInput, also for a moment that is over."""
    if _DURATION.fullmatch(text.strip()):
        return parse_duration(text, "--deadline")
    try:
        moment = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise BadInput(
            f"--deadline '{text}': write how long from now (600, 15m, 2h, 1d), or a moment such as"
            " 2026-12-24T18:00 or 2026-12-24T18:00+01:00."
        ) from None
    if moment <= datetime.now().astimezone():
        raise BadInput(f"--deadline {text} is over already.")
    return moment.isoformat()


def parse_size(text: str, flag: str) -> int | None:
    """ "1000", "100K", "5M" or "2G" as a number, "none" as None; raises BadInput with the flag."""
    if text.strip() == "none":
        return None
    if found := _SIZE.fullmatch(text.strip()):
        return int(found[1]) * _SIZES[found[2]]
    raise BadInput(f"{flag} '{text}': write a number, which may end in K, M or G, or none.")
