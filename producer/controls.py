"""The commands that steer a queue, as they are typed."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.options import Json, Queue, RedisPasswordFile, RedisUrl

app = typer.Typer()


@app.command()
def cancel(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Submissions and jobs, in any number.")
    ],
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Cancel jobs, or all jobs of submissions, that have not ended: waiting and running ones."""
    from producer import steering
    from producer.place import Place

    steering.cancel(Place(redis_url, queue, redis_password_file), ids, json_wanted=json)


PausedName = Annotated[
    str | None,
    typer.Argument(metavar="ADAPTER", help="Only this one; @base is the base model. Else all."),
]


@app.command()
def pause(
    name: PausedName = None,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Let workers claim nothing new of the queue, or of an adapter; what runs is finished."""
    from producer import steering
    from producer.place import Place

    steering.pause(Place(redis_url, queue, redis_password_file), name)


@app.command()
def resume(
    name: PausedName = None,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Let workers claim again what was paused."""
    from producer import steering
    from producer.place import Place

    steering.resume(Place(redis_url, queue, redis_password_file), name)


@app.command()
def limits(
    jobs: Annotated[
        str | None,
        typer.Option("--jobs", metavar="N", help="Jobs that may wait (100000, 500K), or none."),
    ] = None,
    num_bytes: Annotated[
        str | None,
        typer.Option("--bytes", metavar="N", help="Bytes of them that may (500M, 2G), or none."),
    ] = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Bound what may wait in the queue, for all who submit; without options, show it."""
    from producer import steering
    from producer.place import Place

    steering.limits(Place(redis_url, queue, redis_password_file), jobs, num_bytes, json_wanted=json)
