"""Signatures of webhooks, as Standard Webhooks 1.0 (https://www.standardwebhooks.com) has them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import BadInput

#: What a secret begins with when it is written down.
_PREFIX = "whsec_"

#: Bytes of a secret, by the standard.
_MIN_BYTES, _MAX_BYTES = 24, 64

_MAKE_ONE = (
    "python -c \"import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())\""
)


def signature(secrets: Sequence[bytes], id_: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: for each secret ``v1,`` and the base64 of
    HMAC-SHA256(secret, "<id>.<timestamp>.<body>"), with spaces between.

    ``timestamp``: of the try, in seconds since 1970.
    """
    content = f"{id_}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, content, hashlib.sha256) for secret in secrets]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def read_secrets(file: Path | None) -> tuple[bytes, ...]:
    """The secrets in ``file``, in the file that ``WEBHOOK_SECRET_FILE`` names, or in
    ``WEBHOOK_SECRET``, one a line; raises BadInput, which shows nothing of them."""
    named = os.environ.get("WEBHOOK_SECRET_FILE")
    if file or named:
        source = f"--webhook-secret-file {file}" if file else f"WEBHOOK_SECRET_FILE {named}"
        text = _text(file or Path(named or ""), source)
    else:
        source, text = "WEBHOOK_SECRET", os.environ.get("WEBHOOK_SECRET", "")
    lines = text.split()
    if not lines:
        raise BadInput(
            f"{source} holds no secret, and webhooks are not sent unsigned. Name a file by"
            f" --webhook-secret-file, or set WEBHOOK_SECRET. One is made by: {_MAKE_ONE}"
        )
    return tuple(_decoded(line, f"{source}: secret {i}") for i, line in enumerate(lines, start=1))


def _text(file: Path, source: str) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInput(f"{source} cannot be read: {reason}.") from None


def _decoded(line: str, source: str) -> bytes:
    try:
        secret = base64.b64decode(line.removeprefix(_PREFIX), validate=True)
    except ValueError:
        secret = b""
    if not _MIN_BYTES <= len(secret) <= _MAX_BYTES:
        raise BadInput(
            f"{source} is not whsec_ and the base64 of {_MIN_BYTES} to {_MAX_BYTES} bytes. One is"
            f" made by: {_MAKE_ONE}"
        )
    return secret
