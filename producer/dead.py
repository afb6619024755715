"""The commands below ``dead``, as they are typed."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.options import Json, Queue, RedisPasswordFile, RedisUrl

app = typer.Typer(
    name="dead",
    help="List, show, replay and drop the jobs that were given up on.",
    no_args_is_help=True,
)

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="Jobs, and submissions for all dead jobs of theirs."),
]
All = Annotated[bool, typer.Option("--all", help="All dead jobs of the queue.")]


@app.command("list")
def list_(
    ids: Ids = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """List dead jobs with the reason, those given up first in front; without IDs all of them."""
    from producer import replaying
    from producer.place import Place

    replaying.list_dead(Place(redis_url, queue, redis_password_file), ids or [], json_wanted=json)


@app.command()
def show(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job, dead or not.")],
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Show a job and how each of its attempts ended."""
    from producer import replaying
    from producer.place import Place

    replaying.show(Place(redis_url, queue, redis_password_file), job, json_wanted=json)


@app.command()
def replay(
    ids: Ids = None,
    all_: All = False,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Let dead jobs run again, with a fresh count of attempts; their history is kept."""
    from producer import replaying
    from producer.place import Place

    replaying.replay(
        Place(redis_url, queue, redis_password_file), ids or [], all_wanted=all_, json_wanted=json
    )


@app.command()
def drop(
    ids: Ids = None,
    all_: All = False,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Take jobs off this list for good; their results still say why they were given up."""
    from producer import replaying
    from producer.place import Place

    replaying.drop(
        Place(redis_url, queue, redis_password_file), ids or [], all_wanted=all_, json_wanted=json
    )
