"""Where a Redis server is: its URL, checked, with its password from wherever that stands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from schemas.errors import BadInput

#: What a URL names: one server, or who knows where the server is at the moment.
Kind = Literal["server", "socket", "sentinel", "cluster"]

_SCHEMES: dict[str, tuple[Kind, bool]] = {  # and whether connections are encrypted
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("socket", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}

_FORMS = (
    "redis://[user:password@]host[:port][/database], rediss://... with TLS, unix:///path,"
    " redis+sentinel://host[:port][,...]/service or redis+cluster://host[:port][,...]"
)

#: What is wrong where a URL is: commands take it by a flag, the Python client as ``url``.
_NAMED = "What --redis-url, url or REDIS_URL gives"

#: Files that an encrypted connection may need, by the names that redis-py gives them.
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

_TLS_CHOICES: dict[str, dict[str, object]] = {
    "ssl_cert_reqs": {"required": "required", "none": "none"},
    "ssl_check_hostname": {"true": True, "false": False},
}

_SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL."""

    kind: Kind
    nodes: tuple[tuple[str, int], ...]
    """(host, port) of the server, of the Sentinels, or of some nodes of the cluster."""
    path: str
    """Of a socket."""
    service: str
    """What the Sentinels call the server."""
    database: int
    username: str | None
    password: str | None
    tls: dict[str, object] | None
    """redis-py's settings of an encrypted connection; None for one that is not."""
    sentinel_login: dict[str, str]


def parse_address(url: str) -> Address:
    """The parts of a URL; raises BadInput, which shows nothing secret, if it is none."""
    try:
        parts = urlsplit(url)
        kind, is_encrypted = _SCHEMES[parts.scheme]
        userinfo, _, hosts = parts.netloc.rpartition("@")
        username, _, password = userinfo.partition(":")
        service, database = _service_and_database(kind, parts)
        nodes = () if kind == "socket" else _nodes(hosts, 26379 if kind == "sentinel" else 6379)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except (ValueError, KeyError):
        # Not `from error`: the words of the library may quote a part of the password.
        raise BadInput(
            f"{_NAMED} is not the URL of a Redis server. One looks like"
            f" {_FORMS}; in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25."
        ) from None
    allowed = [
        *((*_TLS_FILES, *_TLS_CHOICES) if is_encrypted else ()),
        *(_SENTINEL_LOGIN if kind == "sentinel" else ()),
        *(("db",) if kind == "socket" else ()),
    ]
    if any(name not in allowed for name in options):
        raise BadInput(
            f"{_NAMED} has an option behind its ? that has no meaning there. With"
            f" {parts.scheme}:// there {_may_be(allowed)}."
        )
    if kind == "socket" and not options.get("db", "0").isdecimal():
        raise BadInput("In the URL of the Redis server, db is not a number.")
    return Address(
        kind=kind,
        nodes=nodes,
        path=unquote(parts.path),
        service=service,
        database=int(options.get("db", database)),
        username=unquote(username) or None,
        password=unquote(password) or None,
        tls=_tls(options) if is_encrypted else None,
        sentinel_login={
            name.removeprefix("sentinel_"): options[name]
            for name in _SENTINEL_LOGIN
            if name in options
        },
    )


def resolve_url(url: str | None, password_file: Path | None = None) -> str | None:
    """The server that was named, by ``url`` or ``REDIS_URL``, with its password; None if none was.

    A password that does not stand in the URL comes from ``password_file``, from the file that
    ``REDIS_PASSWORD_FILE`` names, or from ``REDIS_PASSWORD``, whichever is given first.
    """
    url = url or os.environ.get("REDIS_URL") or None
    if url is None:
        if password_file:
            raise BadInput("A password file needs a server: give its URL too, or set REDIS_URL.")
        return None
    if parse_address(url).password:
        if password_file:
            raise BadInput("The URL has a password, and so has the password file: give one.")
        return url
    password = _password(password_file)
    return url if password is None else _with_password(url, password)


def has_password(url: str | None) -> bool:
    """Whether a password stands in the URL itself."""
    return url is not None and parse_address(url).password is not None


def without_password(url: str) -> str:
    """The URL as it may be shown: user, password and query left out."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "that"
    host = parts.netloc.rpartition("@")[2]
    if "@" in parts.path + parts.query + parts.fragment:
        host = "..."  # A password with / ? or # in it: where it ends cannot be told.
        return f"{parts.scheme}://{host}"
    return f"{parts.scheme}://{host}{parts.path}"


def _nodes(hosts: str, default_port: int) -> tuple[tuple[str, int], ...]:
    parts = [urlsplit(f"//{host}") for host in hosts.split(",")]
    return tuple((part.hostname or "localhost", part.port or default_port) for part in parts)


def _service_and_database(kind: Kind, parts: SplitResult) -> tuple[str, int]:
    """What the URL's path says; raises ValueError."""
    path = unquote(parts.path).strip("/")
    if kind == "socket":
        if not path:
            raise ValueError
        return "", 0
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise ValueError
    database = int(path or "0")
    if kind == "cluster" and database:
        raise ValueError  # A cluster has one database only.
    return service, database


def _tls(options: dict[str, str]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for name in _TLS_FILES:
        if name not in options:
            continue
        try:
            open(options[name], "rb").close()
        except OSError as error:
            raise BadInput(
                f"In the URL of the Redis server, {name}={options[name]} cannot be read:"
                f" {error.strerror}."
            ) from error
        settings[name] = options[name]
    for name, choices in _TLS_CHOICES.items():
        if name not in options:
            continue
        if options[name].lower() not in choices:
            raise BadInput(
                f"In the URL of the Redis server, {name} is one of {', '.join(choices)}."
            )
        settings[name] = choices[options[name].lower()]
    return settings


def _may_be(options: list[str]) -> str:
    return f"may be {', '.join(options)}" if options else "are no options"


def _password(file: Path | None) -> str | None:
    named = os.environ.get("REDIS_PASSWORD_FILE")
    if file is None and not named:
        return os.environ.get("REDIS_PASSWORD") or None
    name = "The password file" if file else "REDIS_PASSWORD_FILE"
    file = file or Path(named or "")
    try:
        password = file.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInput(f"{name} {file} cannot be read: {reason}.") from None
    if not password:
        raise BadInput(f"{name} {file} is empty; the password stands alone on its first line.")
    return password


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    login = f"{userinfo.partition(':')[0]}:{quote(password, safe='')}@"
    return parts._replace(netloc=login + host).geturl()
