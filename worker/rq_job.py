"""An rq job as a process of Lorry reads it: it can name one function, and nothing that is looked
up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

from redis import Redis, RedisError
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from schemas.errors import LorryError


class JobRefused(LorryError):
    """A job on the rq queue that no process of Lorry sends."""


class OneFunctionJob(Job, ABC):
    """A job whose record decides nothing but the two texts that a given function is called with;
    the second one is the job's id.

    rq would import, from names in the record, the function and up to three callbacks, call up web
    addresses, and unpickle what its default serializer wrote; all for whoever writes to Redis to
    choose. Here ``read`` refuses such records, whatever serializer is asked for JSON is used, and
    ``func`` is what the process has set.
    """

    #: The one function that a record may name; nobody imports it by that name.
    name_of_function: ClassVar[str]

    #: How an error calls the two texts.
    arguments: ClassVar[str]

    def __init__(
        self, id_: str | None = None, connection: Redis | None = None, serializer: Any = None
    ) -> None:
        super().__init__(id_, connection, JSONSerializer)
        self.function: Callable[..., None] | None = None

    @property
    def func(self) -> Callable[..., None] | None:
        return self.function

    @classmethod
    def read(cls, id_: str, connection: Redis, rq_queue: str) -> Self | None:
        """The job of that id on that queue; None if there is none. Raises JobRefused."""
        try:
            job = cls.fetch(id_, connection)
        except NoSuchJobError:
            return None
        except RedisError:
            raise
        except Exception as error:  # rq raises whatever the first damaged field makes Python raise.
            raise JobRefused(f"its record is damaged: {error}") from error
        assert isinstance(job, cls)
        job._refuse_all_but_the_function(rq_queue)
        job._set_terms()
        return job

    @abstractmethod
    def _set_terms(self) -> None:
        """Set how long and how often it is tried, and kept: not for the record to say either."""

    def _refuse_all_but_the_function(self, rq_queue: str) -> None:
        try:
            name, instance, args, kwargs = self.func_name, self.instance, self.args, self.kwargs
        except Exception as error:
            raise JobRefused("what it asks for is not JSON of four parts.") from error
        if name != self.name_of_function or instance is not None:
            raise JobRefused(f"it asks for {name!r}; only {self.name_of_function!r} is run here.")
        are_texts = isinstance(args, list) and [type(arg) for arg in args] == [str, str]
        if not are_texts or kwargs:
            raise JobRefused(f"its arguments are not {self.arguments}.")
        if args[1] != self.id:
            raise JobRefused(f"it is called {self.id!r} and is for {args[1]!r}.")
        if self.origin != rq_queue:
            raise JobRefused(f"it says that it is of queue {self.origin!r}.")
        for what, is_given in (
            ("a callback", self._success_callback_name),
            ("a callback", self._failure_callback_name),
            ("a callback", self._stopped_callback_name),
            ("a web address to call", self.webhooks),
            ("other jobs to wait for", self._dependency_ids),
            ("repetitions", self.repeats_left),
            ("a group", self.group_id),
            ("a rate limit", self.rate_limit_key),
        ):
            if is_given:
                raise JobRefused(f"it names {what}.")
