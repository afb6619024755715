"""Records read from Redis, where another program may have written them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import redis
from pydantic import BaseModel, TypeAdapter, ValidationError

from schemas.adapter import AdapterRecord
from schemas.errors import LorryError
from schemas.faults import first_fault
from schemas.hub import FetchRecord
from schemas.keys import Keys
from schemas.webhook import Webhook

Record = TypeVar("Record", bound=BaseModel)

#: As scripts write them: not "٣" or "1_0", which Python takes, nor more than fits into a moment.
_WHOLE_NUMBER = re.compile("[0-9]{1,15}")


def sound_replies(pipeline: Any) -> list[Any]:
    """What a pipeline's commands reply: None where another program has put a value of another type
    at the key, which so hides no other. Raises any other error of a command."""
    replies = pipeline.execute(raise_on_error=False)
    for i, reply in enumerate(replies):
        if isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE"):
            replies[i] = None
        elif isinstance(reply, Exception):
            raise reply
    return replies  # type: ignore[no-any-return]


def whole_number(digits: str | None) -> int:
    """A count of a record; 0 where there is none, or something else."""
    return int(digits) if digits and _WHOLE_NUMBER.fullmatch(digits) else 0


def seconds(milliseconds: str | None) -> float | None:
    """A moment of a record; None where there is none, or something else."""
    is_moment = milliseconds and _WHOLE_NUMBER.fullmatch(milliseconds)
    return int(milliseconds) / 1000 if milliseconds and is_moment else None


def read_record(model: type[Record], text: str, what: str) -> Record:
    """The record in a text; raises LorryError, which calls it ``what``, if there is none in it."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(what, error) from error


def read_adapter(name: str, text: str) -> AdapterRecord:
    """One adapter of the desired state; raises LorryError for a damaged record."""
    try:
        return read_record(AdapterRecord, text, f"The record of adapter '{name}'")
    except LorryError as error:
        raise LorryError(f"{error}. `producer lora load {name} PATH` writes it anew.") from error


def read_adapters(records: dict[str, str]) -> dict[str, AdapterRecord]:
    """The desired state in the order of the names; raises LorryError for a damaged record."""
    return {name: read_adapter(name, record) for name, record in sorted(records.items())}


def read_version(text: str | None) -> int:
    """The version of the desired state, 0 if there is none; raises LorryError for a damaged one."""
    try:
        return 0 if text is None else int(text)
    except ValueError as error:
        raise LorryError(
            f"The version of the desired state is damaged: '{text:.40}' is no integer. Set the key"
            " 'adapters:version' of the queue to one above what the workers report."
        ) from error


def damaged_limits(queue: str, damage: str) -> LorryError:
    """How to mend what says how much may wait in a queue."""
    return LorryError(
        f"What may wait in queue '{queue}' is damaged: {damage}. Delete the key"
        f" '{Keys(queue).limits}', and set it again with `producer limits`."
    )


def read_fetch(name: str, text: str) -> FetchRecord:
    """One request of ``{queue}:fetches``; raises LorryError for a damaged record."""
    return read_record(FetchRecord, text, f"The record of the fetch of adapter '{name}'")


def read_webhook(submission: str, fields: Mapping[str, str]) -> Webhook | None:
    """What the fields of a submission's hash say of its webhook; raises LorryError if they are
    damaged."""
    if "webhook" not in fields:
        return None
    given = {
        name.removeprefix("webhook_"): value
        for name, value in fields.items()
        if name.startswith("webhook_")
    }
    try:
        for name in _MOMENTS & given.keys():
            given[name] = str(int(given[name]) / 1000)
        return _WEBHOOK.validate_strings({"url": fields["webhook"], **given})
    except ValidationError as error:
        raise _damaged(f"The webhook of submission '{submission}'", error) from error
    except ValueError as error:
        raise LorryError(f"The webhook of submission '{submission}' is damaged: {error}") from error


_WEBHOOK = TypeAdapter(Webhook)

#: Fields that Redis holds in milliseconds.
_MOMENTS = {"ended", "first_try", "next_try", "settled"}


def _damaged(what: str, error: ValidationError) -> LorryError:
    return LorryError(f"{what} is damaged: {first_fault(error)}")
