"""How webhooks are signed, and the verification that docs/webhooks.md shows to receivers."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from schemas.errors import BadInput
from worker.webhooks.signature import read_secrets, signature

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

Verify = Callable[[str, Mapping[str, str], bytes], bool]


def decoded(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_"))


def test_the_example_of_the_standard_is_signed_as_it_is_there() -> None:
    signed = signature(
        [decoded(SECRET)],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.fixture(scope="module")
def verify() -> Verify:
    """The function of the page, as a reader copies it."""
    page = (Path(__file__).parents[1] / "docs" / "webhooks.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Verify] = {}
    exec(code, names)
    return names["is_genuine"]


def signed(body: bytes, *secrets: str, at: float | None = None) -> dict[str, str]:
    now = int(time.time() if at is None else at)
    keys = [decoded(secret) for secret in secrets]
    return {
        "webhook-id": "an-id",
        "webhook-timestamp": str(now),
        "webhook-signature": signature(keys, "an-id", now, body),
    }


def test_the_page_verifies_what_a_notifier_signs(verify: Verify) -> None:
    assert verify(SECRET, signed(b"{}", SECRET), b"{}")


def test_while_a_secret_is_changed_receivers_of_either_verify(verify: Verify) -> None:
    other = "whsec_" + base64.b64encode(b"x" * 32).decode()
    headers = signed(b"{}", other, SECRET)
    assert verify(SECRET, headers, b"{}")
    assert verify(other, headers, b"{}")


@pytest.mark.parametrize("forged", ["body", "webhook-id", "webhook-timestamp", "secret", "old"])
def test_the_page_refuses_what_was_changed_or_is_old(verify: Verify, forged: str) -> None:
    headers = signed(b"{}", SECRET, at=time.time() - 3600 if forged == "old" else None)
    if forged == "webhook-timestamp":
        headers[forged] = str(int(headers[forged]) + 1)
    elif forged in headers:
        headers[forged] = "another"
    secret = "whsec_" + "A" * 32 if forged == "secret" else SECRET
    assert not verify(secret, headers, b"{ }" if forged == "body" else b"{}")


def test_secrets_come_from_the_first_source_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ["whsec_" + base64.b64encode(letter * 24).decode() for letter in (b"a", b"b", b"c")]
    flagged, named = tmp_path / "flagged", tmp_path / "named"
    flagged.write_text(f"{secrets[0]}\n")
    named.write_text(f"{secrets[1]}\n{secrets[2]}\n")
    monkeypatch.setenv("WEBHOOK_SECRET", secrets[2])
    assert read_secrets(None) == (b"c" * 24,)
    monkeypatch.setenv("WEBHOOK_SECRET_FILE", str(named))
    assert read_secrets(None) == (b"b" * 24, b"c" * 24)
    assert read_secrets(flagged) == (b"a" * 24,)


@pytest.mark.parametrize(
    "secret", ["whsec_", "hunter2", "whsec_" + "Abc3" * 5, "Abc3" * 23, "whsec_äöüß"]
)
def test_what_is_no_secret_is_refused_and_not_shown(secret: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(f"{SECRET}\n{secret}\n")
    with pytest.raises(BadInput, match="secret 2 is not whsec_") as error:
        read_secrets(file)
    for part in ("hunter2", "Abc3", "äöü", SECRET):
        assert part not in str(error.value)
