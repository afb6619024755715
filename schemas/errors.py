"""Every error that Lorry raises on purpose.

LorryError                    exit code of the command line
|- BadInput                   2   a flag, a file or a line is wrong; says where and what to do
|  |- BadParameter            2   the value of a parameter of the Python client, or a flag
|  `- TooManyPinned           2   as many adapters are pinned as may be
|- UnknownId                  3   no such job, submission or adapter on this queue
|- ServerUnavailable          4   the Redis server cannot be reached or used
|- NotFinished                5   results are not complete yet
|- NoWorker                   6   no worker is alive to complete results, or to act on a command
|- QueueFull                  7   as many jobs wait as the queue allows
`- JobError                   -   one job failed; carries the code that its result records
"""

from __future__ import annotations


class LorryError(Exception):
    """Base of all errors whose message is meant for a person; never shown with a traceback."""

    exit_code = 1


class BadInput(LorryError):
    """What the caller gave is wrong; nothing was sent or started."""

    exit_code = 2


class BadParameter(BadInput):
    """The value of one named parameter is wrong. A command line knows it by another name."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"{name}: {fault}")
        self.name = name
        self.fault = fault


class TooManyPinned(BadInput):
    """As many adapters are pinned as the caller allows; nothing was changed."""

    def __init__(self, name: str, pinned: list[str]) -> None:
        super().__init__(f"'{name}' cannot be pinned beside {', '.join(pinned) or 'none'}.")
        self.pinned = pinned


class UnknownId(LorryError):
    """The queue holds no job, submission or adapter of that id."""

    exit_code = 3


class ServerUnavailable(LorryError):
    """The Redis server cannot be reached, refused the command, or could not be started."""

    exit_code = 4


class NotFinished(LorryError):
    """Some of the jobs asked for have no result yet."""

    exit_code = 5


class NoWorker(LorryError):
    """Some of the jobs asked for have no result yet, or a command was given, and no worker is
    alive."""

    exit_code = 6


class QueueFull(LorryError):
    """As many jobs or bytes wait as the queue allows, and the caller did not want to wait."""

    exit_code = 7


class JobError(LorryError):
    """One job cannot be run; recorded as ``error`` of its result.

    Codes: ``unknown_adapter``, ``adapter_unavailable``, ``no_tokenizer``, ``no_chat_template``,
    ``bad_prompt``, ``prompt_too_long``, ``kv_cache_too_small``, ``not_finite``, ``bad_record``,
    ``bad_sampling``, ``too_many_logprobs``, ``out_of_memory``; of a job that no worker ended
    ``attempts_exhausted`` (given up on), ``adapter_unloaded`` (by force, while it waited),
    ``expired`` (its deadline came while it waited) and ``cancelled``; of a line
    that was refused, and sent all the same, ``bad_line``.
    """

    def __init__(self, code: str, message: str, *, may_heal: bool = False) -> None:
        """``may_heal``: the same job may succeed later, so it is tried again."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.may_heal = may_heal
