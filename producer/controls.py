"""The commands that steer a queue, as they are typed."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.options import Json, Queue, RedisUrl

app = typer.Typer()


@app.command()
def cancel(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Submissions and jobs, in any number.")
    ],
    json: Json = False,
    redis_url: RedisUrl = None,
    queue: Queue = "lorry",
) -> None:
    """Cancel jobs, or all jobs of submissions, that have not ended: waiting and running ones."""
    from producer import steering
    from producer.place import Place

    steering.cancel(Place(redis_url, queue), ids, json_wanted=json)
