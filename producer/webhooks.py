"""Webhooks, as those who submit ask for them and see them."""

from __future__ import annotations

from datetime import datetime

from broker.notices import Notices
from producer.advice import counted
from schemas.errors import BadParameter
from schemas.webhook import Webhook, WebhookUrl


def check_webhook(notices: Notices, url: str) -> None:
    """Raises BadParameter for what is no URL of a webhook, or is none of the hosts that a living
    notifier may tell; and ServerUnavailable if there cannot be a notifier on this server."""
    notices.require_rq()
    try:
        parts = WebhookUrl.parse(url)
    except ValueError as error:
        raise BadParameter("webhook", f"{url}: {error}. Give https://HOST[:PORT]/PATH.") from None
    hosts = notices.allowed_hosts()
    if hosts is not None and not parts.is_among(hosts):
        raise BadParameter(
            "webhook",
            f"{parts.netloc} is not among the hosts that the notifier's --webhook-hosts names"
            f" ({', '.join(hosts)}).",
        )


def describe_webhook(webhook: Webhook) -> str:
    """How far it is, without a full stop."""
    attempts = counted(webhook.attempts, "attempt")
    match webhook.state:
        case "waiting":
            return "told when all jobs have ended"
        case "delivered":
            return f"delivered at {_moment(webhook.settled)}, by {attempts}"
        case "dead":
            return f"dead since {_moment(webhook.settled)}, after {attempts}: {webhook.error}"
    if webhook.next_try is None:
        return "pending"
    return f"pending, after {attempts}: {webhook.error}; next try at {_moment(webhook.next_try)}"


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
