"""The commands below ``lora``, as they are typed."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.options import Json, Queue, RedisPasswordFile, RedisUrl

app = typer.Typer(
    name="lora",
    help="Load, unload and pin adapters on all workers while they run.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter, as jobs name it.")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until every living worker has done it.")
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0,
        help="Wait at most so long; else 60, and for an unload as long as its jobs are finished.",
    ),
]


@app.command()
def load(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH|REPO",
            help="Its PEFT folder, as the workers see it; a relative one counts from here. Or"
            " OWNER/NAME[@REVISION] on the Hugging Face hub, which a fetcher brings first: a folder"
            " of that name here wins; hf:OWNER/NAME is always the hub, ./OWNER/NAME never.",
        ),
    ],
    pin: Annotated[
        bool,
        typer.Option(
            "--pin", help="Let it keep a slot on every worker; left out, a pin stays as it is."
        ),
    ] = False,
    wait: Wait = True,
    timeout: Timeout = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Load an adapter, or replace the one of that name: jobs that run go on with the old one."""
    from producer import loading
    from producer.place import Place

    place = Place(redis_url, queue, redis_password_file)
    loading.load(place, name, path, pinned=pin, report=loading.Report(wait, timeout, json))


@app.command()
def unload(
    name: Name,
    force: Annotated[
        bool,
        typer.Option(
            "--force/--drain",
            help="Let its waiting jobs fail, or finish them first. It takes no new ones.",
        ),
    ] = False,
    wait: Wait = True,
    timeout: Timeout = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Unload an adapter; jobs that run are finished either way."""
    from producer import loading
    from producer.place import Place

    place = Place(redis_url, queue, redis_password_file)
    loading.unload(place, name, force=force, report=loading.Report(wait, timeout, json))


@app.command()
def pin(
    name: Name,
    wait: Wait = True,
    timeout: Timeout = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Let an adapter keep a slot on every worker."""
    from producer import loading
    from producer.place import Place

    loading.pin(
        Place(redis_url, queue, redis_password_file), name, loading.Report(wait, timeout, json)
    )


@app.command()
def unpin(
    name: Name,
    wait: Wait = True,
    timeout: Timeout = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Let an adapter give up its slot like any other."""
    from producer import loading
    from producer.place import Place

    loading.unpin(
        Place(redis_url, queue, redis_password_file), name, loading.Report(wait, timeout, json)
    )


@app.command("list")
def list_(
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Show the adapters, where they are loaded, and what they have done."""
    from producer import loading
    from producer.place import Place

    loading.list_adapters(Place(redis_url, queue, redis_password_file), json_wanted=json)
