"""Webhooks: the web address that is told when a submission has ended, and how far that is."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import IPv6Address
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass

#: What happened, in the words of a notice.
EVENT_TYPE = "submission.finished"

#: The rq queue of one Lorry queue is called so, and the queue's name: rq's keys are those of the
#: whole server.
WEBHOOK_QUEUE_PREFIX = "webhooks:"

#: The one function that a notifier runs. rq jobs name it; nobody imports it by that name.
WEBHOOK_FUNCTION = "lorry.post_webhook"

#: Seconds after which one try to deliver is given up.
WEBHOOK_TIMEOUT = 15

#: Seconds for which rq keeps its record of a try that has ended.
WEBHOOK_KEPT = 3600

#: Characters of the longest URL: what practically every server and proxy takes.
MAX_URL = 2000

_PORTS = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")

#: Seconds since 1970, up to the year 9999.
Moment = Annotated[float, Field(ge=0, lt=253402300800)]

WebhookState = Literal["waiting", "pending", "delivered", "dead"]


@dataclass(frozen=True)
class Webhook:
    """What is known of the webhook of a submission."""

    url: str
    state: WebhookState = "waiting"
    """``waiting`` for the submission's end, ``pending`` until it is told, then ``delivered``, or
    ``dead`` if it cannot be."""
    event: str | None = None
    """The id of the notice, the same in every try."""
    ended: Moment | None = None
    """When the submission has ended."""
    attempts: int = 0
    """Tries by now."""
    next_try: Moment | None = None
    """Not before this, once a try has failed."""
    error: str | None = None
    """Why the last try failed, or why there is none any more."""
    settled: Moment | None = None
    """When it was delivered or given up."""


@dataclass(frozen=True)
class WebhookUrl:
    """A URL that a webhook may have, in the parts that an HTTP request is made of."""

    is_encrypted: bool
    host: str
    """Lower case; an IPv6 address in brackets."""
    port: int
    target: str
    """Path and query."""

    @classmethod
    def parse(cls, text: str) -> WebhookUrl:
        """Raises ValueError, with the reason, for anything that different programs could read in
        different ways."""
        if len(text) > MAX_URL:
            raise ValueError(f"it is longer than {MAX_URL} characters")
        # What urlsplit would leave out, and what some read as a slash.
        if not re.fullmatch(r"[!-~]*", text) or "\\" in text:
            raise ValueError("it holds spaces, backslashes or other characters than ASCII")
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"it is no URL: {error}") from None
        if parts.scheme not in _PORTS:
            raise ValueError("it does not begin with https:// or http://")
        if "@" in parts.netloc:
            raise ValueError("it holds a user or a password, which everybody could read")
        if parts.fragment:
            raise ValueError("it has a #fragment, which is never sent")
        if ":" in host:
            host = f"[{IPv6Address(host)}]"
        elif not _HOST_NAME.fullmatch(host):
            raise ValueError("it names no host" if not host else f"{host} is no host's name")
        if port == 0:
            raise ValueError("there is no port 0")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme == "https", host, port or _PORTS[parts.scheme], target)

    @property
    def has_default_port(self) -> bool:
        return self.port == _PORTS["https" if self.is_encrypted else "http"]

    @property
    def netloc(self) -> str:
        """Host and port, as the header ``Host`` and a list of hosts have them."""
        return self.host if self.has_default_port else f"{self.host}:{self.port}"

    def is_among(self, hosts: Collection[str]) -> bool:
        """Whether a list of ``HOST`` (at the scheme's own port) or ``HOST:PORT`` allows it."""
        return self.netloc in hosts or f"{self.host}:{self.port}" in hosts


def parse_webhook_host(text: str) -> str:
    """One of a list of hosts, ``HOST`` or ``HOST:PORT``, in the form that ``is_among`` compares;
    raises ValueError."""
    url = WebhookUrl.parse(f"http://{text}")
    if url.target != "/" or text.endswith("/") or "?" in text:
        raise ValueError("give HOST or HOST:PORT alone")
    has_port = text.rpartition("]")[2].rpartition(":")[1] == ":"
    return f"{url.host}:{url.port}" if has_port else url.host
