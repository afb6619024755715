"""One line of a prompts file -> ``schemas.Job``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any, BinaryIO

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from schemas.errors import BadInput
from schemas.faults import place_of, plain
from schemas.job import Job, Message

#: The longest line that is read, in bytes; it bounds the memory that one line takes.
MAX_LINE_BYTES = 16 * 1024 * 1024

#: Faults of one line that are told; the rest is counted.
MAX_FAULTS = 3

#: What other programs call a field; spelling mistakes are found without a table.
_OTHER_NAMES = {
    "adapter": "lora",
    "adapter_name": "lora",
    "lora_name": "lora",
    "lora_path": "lora",
    "custom_id": "id",
    "text": "prompt",
    "input_ids": "prompt_token_ids",
    "token_ids": "prompt_token_ids",
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
}

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1.

    Of a line that is too long its beginning is given, which ``parse_line`` refuses.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if len(line) > MAX_LINE_BYTES:
            _skip_rest_of_line(stream, line)
        if not line.isspace() and line:
            yield number, line


#: Fields of a job, for the lines that do not have them.
Defaults = Mapping[str, object]


def parse_line(line: bytes, *, made_id: str, defaults: Defaults | None = None) -> Job:
    """The job that a line asks for; ``made_id`` serves where it names none, as ``defaults`` do.

    What the line says wins, also an explicit null: as ``lora`` that names the base model. Raises
    BadInput with what is wrong, without the place.
    """
    return make_job(read_line(line), made_id=made_id, defaults=defaults)


def read_line(line: bytes) -> object:
    """What a line holds as JSON. Raises BadInput with what is wrong, without the place."""
    if len(line) > MAX_LINE_BYTES:
        raise BadInput(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return from_json(line.rstrip())
    except ValueError as error:
        raise BadInput(_why_not_json(line, error)) from None


def make_job(value: object, *, made_id: str, defaults: Defaults | None = None) -> Job:
    """The job of a line's value: an object with its fields, a prompt, or a Job, taken as it is.

    Raises BadInput with what is wrong, without the place.
    """
    if isinstance(value, Job):
        job = value
    else:
        fields = {**(defaults or {}), **_fields(value)}
        if fields.get("id") is None:
            fields["id"] = made_id
        try:
            job = Job.model_validate(fields)
        except ValidationError as error:
            raise BadInput(_describe(error)) from None
    if job.metadata is not None:
        _check_metadata(job.metadata)
    return job


def _skip_rest_of_line(stream: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE_BYTES)


def _fields(value: object) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, Mapping):
        return value
    raise BadInput(
        f"a line is a JSON object, or a JSON string that is the prompt, not {shown(value)}"
    )


def _check_metadata(metadata: object) -> None:
    """Refuses what JSON cannot hold: it would come back as something else."""
    try:
        json.dumps(metadata, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BadInput(
            "metadata: NaN, infinity and endless nesting cannot be written as JSON"
        ) from None


def _why_not_json(line: bytes, error: ValueError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"not UTF-8: byte 0x{line[wrong.start]:02x} at position {wrong.start + 1}"
    reason = re.sub(r" at line \d+ column (\d+)$", r" at column \1", str(error))
    return f"not JSON: {reason}"


def _describe(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_context=False)
    told = [_fault(fault) for fault in islice(faults, MAX_FAULTS)]
    if len(faults) > MAX_FAULTS:
        told.append(f"and {len(faults) - MAX_FAULTS} more")
    return "; ".join(told)


def _fault(fault: ErrorDetails) -> str:
    """pydantic's account of one fault as "field: what is wrong"."""
    place, kind = fault["loc"], fault["type"]
    if kind == "value_error":  # Of ours: it says by itself what was found.
        return ": ".join([*([_place(place)] if place else []), plain(fault["msg"])])
    if kind == "extra_forbidden":
        return _unknown_field(place)
    what = _PATTERNS[str(place[0])] if kind == "string_pattern_mismatch" else plain(fault["msg"])
    says_itself = kind in ("missing", "too_short", "too_long")  # "..., not 0"
    found = "" if says_itself else f" (found {shown(fault['input'])})"
    return f"{_place(place)}: {what}{found}"


_PATTERNS = {
    "id": "should be without spaces and control characters",
    "lora": "should be letters, digits and . _ - / beginning with a letter or digit",
}


def _unknown_field(place: tuple[int | str, ...]) -> str:
    name = str(place[-1])
    known = list((Job if len(place) == 1 else Message).model_fields)
    hint = _OTHER_NAMES.get(name) if len(place) == 1 else None
    if not hint:
        close = get_close_matches(name[:100], known, n=1)
        hint = close[0] if close else None
    remedy = f"did you mean '{hint}'?" if hint else f"known are {', '.join(known)}"
    return f"unknown field {shown(_place(place))}: {remedy}"


def _place(place: tuple[int | str, ...]) -> str:
    # What follows are names of pydantic's, not of the line's.
    return "metadata" if place[0] == "metadata" else place_of(place)


def shown(value: object) -> str:
    """A value, or what kind of value it is, in a few words."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "an array"
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 40 else f"'{value[:37]}...'"
    if value is None or isinstance(value, bool | int | float):
        text = json.dumps(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return f"a Python {type(value).__name__}"
