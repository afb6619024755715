"""What a server's settings mean for the jobs it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from schemas.errors import ServerUnavailable


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Those that decide whether jobs are kept; None is what the server does not tell this user."""

    mode: str | None
    """standalone, cluster or sentinel."""
    evicts: str | None
    """The policy by which a full server drops keys; "" if it drops none."""
    has_append_only_file: bool | None
    append_fsync: str | None
    """When the append-only file is written to disk: always, everysec or no."""
    snapshots: str | None
    """When snapshots are taken; "" is never."""


def read_settings(client: redis.Redis) -> ServerSettings:
    """Ask for what this user may know; many servers forbid CONFIG, some INFO."""
    info: dict[str, Any] = _allowed(client.info)
    config: dict[str, str] = _allowed(client.config_get, "appendfsync", "save")
    policy, limit = info.get("maxmemory_policy"), info.get("maxmemory")
    evicts = None if policy is None else policy if limit and policy != "noeviction" else ""
    is_appending = info.get("aof_enabled")
    return ServerSettings(
        mode=info.get("redis_mode") or info.get("server_mode"),  # So called by Valkey.
        evicts=evicts,
        has_append_only_file=None if is_appending is None else bool(is_appending),
        append_fsync=config.get("appendfsync"),
        snapshots=config.get("save"),
    )


def require_fitting_mode(settings: ServerSettings, server: str, *, is_cluster: bool) -> None:
    """Raises ServerUnavailable if the URL names a Sentinel or a cluster like a single server."""
    if settings.mode == "sentinel":
        raise ServerUnavailable(
            f"{server} is a Sentinel, which holds no jobs. Let the URL say so:"
            " redis+sentinel://host:port/SERVICE."
        )
    if settings.mode == "cluster" and not is_cluster:
        raise ServerUnavailable(needs_cluster_url(server))


def needs_cluster_url(server: str) -> str:
    """What to say of a node of a cluster that is named like a single server."""
    return f"{server} belongs to a Redis Cluster. Let the URL say so: redis+cluster://host:port."


def warnings(settings: ServerSettings) -> list[str]:
    """By which settings the server may lose jobs, and what to set, a sentence or two each."""
    found = []
    if settings.evicts:
        found.append(
            f"The server drops keys when it is full (maxmemory-policy {settings.evicts}), and jobs"
            " with them: CONFIG SET maxmemory-policy noeviction."
        )
    if settings.has_append_only_file is False:
        since = "since its last snapshot" if settings.snapshots else "that it holds"
        if settings.snapshots is None:
            since = "since its last snapshot, if it takes any"
        found.append(
            f"The server keeps no append-only file: if it ends, the jobs {since} are lost."
            " CONFIG SET appendonly yes, and the same in its configuration file."
        )
    elif settings.append_fsync == "no":
        found.append(
            "The server leaves it to the system when its append-only file is written to disk"
            " (appendfsync no): CONFIG SET appendfsync everysec."
        )
    return found


def _allowed(ask: Any, *what: str) -> dict[str, Any]:
    """The answer, empty if this user may not ask, or the server does not know the question."""
    try:
        return dict(ask(*what))
    except NoPermissionError:
        return {}
    except redis.ResponseError as error:
        if "unknown command" in str(error).lower():
            return {}
        raise
