"""One HTTP request to a webhook."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection

from schemas.errors import LorryError
from schemas.webhook import WebhookUrl

#: Seconds of silence, while connecting or later, after which a receiver counts as away.
_SILENCE = 10.0

#: Characters of a receiver's words that are kept.
_MAX_WORDS = 100


class DeliveryFailed(LorryError):
    """A receiver did not accept a notice; it may, later."""


def post(url: WebhookUrl, headers: Mapping[str, str], body: bytes) -> None:
    """Send a body; raises DeliveryFailed for all but an answer of 2xx.

    Redirects are answers like others: they are not followed. Nothing behind an answer's headers is
    read, and of these as much as http.client bears: 100 of 64 KiB. Environment variables that name
    proxies have no meaning here.
    """
    connection = _connection(url)
    try:
        connection.request("POST", url.target, body, {**headers, "Host": url.netloc})
        answer = connection.getresponse()
    except (OSError, HTTPException) as error:
        reason = _words(str(error)) or type(error).__name__
        raise DeliveryFailed(f"{url.netloc}: {reason}") from error
    finally:
        connection.close()
    if not 200 <= answer.status < 300:
        is_redirect = 300 <= answer.status < 400
        more = "; redirects are not followed" if is_redirect else ""
        raise DeliveryFailed(
            f"{url.netloc} answered {answer.status} {_words(answer.reason)}".rstrip() + more
        )


def _connection(url: WebhookUrl) -> HTTPConnection:
    host = url.host.strip("[]")
    if not url.is_encrypted:
        return HTTPConnection(host, url.port, timeout=_SILENCE)
    context = ssl.create_default_context()
    return HTTPSConnection(host, url.port, timeout=_SILENCE, context=context)


def _words(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:_MAX_WORDS].strip()
