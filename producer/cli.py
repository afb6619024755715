"""The command line: what is typed, and how mistakes are answered.

Only Typer is imported at the start; a command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from broker.interrupts import INTERRUPTED, end_at_once
from producer import submit_options
from producer.controls import app as controls_app
from producer.dead import app as dead_app
from producer.lora import app as lora_app
from producer.messages import fail
from producer.options import FORMATS, Json, OutputFile, Queue, RedisPasswordFile, RedisUrl
from schemas.errors import BadInput, BadParameter, LorryError
from schemas.faults import plain

EXIT_CODES = """\
**Exit codes**

- 0: all is well
- 1: some jobs did not end as done (wait, submit --wait), a worker did not do as it was told (lora),
  or another failure
- 2: wrong usage or input; nothing was sent
- 3: unknown id or adapter
- 4: no server
- 5: not finished
- 6: not finished, or told to nobody (lora), and no worker (or no fetcher, for the hub) is alive
- 7: the queue is full (submit --when-full refuse, or no room within --timeout)
- 130: interrupted by Ctrl-C; what was sent goes on
"""

#: The exit code that a shell gives a program ended by a reader that has gone.
NO_READER = 141


class Format(StrEnum):
    jsonl = "jsonl"
    openai = "openai"
    table = "table"


class Commands(TyperGroup):
    """Answers a person's mistake, or the world's, with a sentence instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = plain(error.message)
            raise
        except BadParameter as error:
            flag = "-n" if error.name == "n" else f"--{error.name.replace('_', '-')}"
            fail(f"{flag}: {error.fault}")
            raise typer.Exit(error.exit_code) from None
        except LorryError as error:
            fail(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            fail("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # What is still buffered must not be flushed into the closed pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(NO_READER) from None
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="Send files of prompts to a multi-LoRA queue, and fetch one result per job.",
    epilog=EXIT_CODES,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # It would show local variables, the server's URL among them.
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(lora_app)
app.add_typer(dead_app)
app.add_typer(controls_app)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from broker.release import release

    typer.echo(release())
    raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def submit(
    file: submit_options.File,
    lora: submit_options.Lora = None,
    priority: submit_options.Priority = submit_options.PriorityName.normal,
    deadline: submit_options.Deadline = None,
    max_tokens: submit_options.MaxTokens = None,
    temperature: submit_options.Temperature = None,
    top_p: submit_options.TopP = None,
    top_k: submit_options.TopK = None,
    min_p: submit_options.MinP = None,
    seed: submit_options.Seed = None,
    stop: submit_options.Stop = None,
    n: submit_options.NumAnswers = None,
    result_ttl: submit_options.ResultTtl = "7d",
    when_full: submit_options.WhenFull = submit_options.WhenFullName.wait,
    webhook: submit_options.Webhook = None,
    lenient: submit_options.Lenient = False,
    wait: submit_options.Wait = False,
    timeout: submit_options.Timeout = None,
    output: OutputFile = None,
    format_: submit_options.Format = None,
    durable: submit_options.Durable = False,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Send the prompts of FILE, once every line is found valid.

    A line holds exactly one of prompt, messages, prompt_token_ids, and may hold id, lora,
    priority, deadline, metadata, max_tokens, min_tokens, temperature, top_p, top_k, min_p, seed,
    stop, stop_token_ids, ignore_eos, repetition_penalty, presence_penalty, frequency_penalty,
    logit_bias, bad_words, logprobs, top_logprobs, prompt_logprobs, n.
    A job whose line gives no id is called SUBMISSION.LINE, with the number of its line.

    A line of OpenAI's batch files holds custom_id, method, url and body, and its model names the
    base model, or an adapter as ADAPTER or BASE:ADAPTER.
    """
    from producer import submitting
    from producer.place import Place
    from producer.quantities import parse_deadline, parse_duration
    from producer.terms import Terms

    place = Place(redis_url, queue, redis_password_file)
    output = None if output == Path("-") else output
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop,
        "n": n,
    }
    terms = Terms(
        lora=lora,
        priority=priority.value,
        deadline=None if deadline is None else parse_deadline(deadline),
        sampling={field: value for field, value in sampling.items() if value is not None},
        result_ttl=parse_duration(result_ttl, "--result-ttl"),
        when_full=when_full.value,
        webhook=webhook,
        lenient=lenient,
    )
    if not wait:
        _refuse_what_only_waits(format_, output, timeout)
        submitting.submit(place, file, terms, durable=durable, json_wanted=json)
        return
    if timeout is not None and not timeout >= 0:  # NaN, which is not below the least.
        raise BadInput(f"--timeout takes a number of seconds, not {timeout}.")
    if json and not output:
        raise BadInput("--json with --wait needs -o FILE: stdout cannot hold both.")
    submitting.submit_and_wait(
        *(place, file, terms, output),
        form=format_.value if format_ else "jsonl",
        timeout=timeout,
        durable=durable,
        json_wanted=json,
    )


def _refuse_what_only_waits(
    format_: submit_options.LineFormat | None, output: Path | None, timeout: float | None
) -> None:
    if format_:
        raise BadInput("--format is that of results, and only --wait brings them.")
    if output:
        raise BadInput("-o takes results, and only --wait brings them.")
    if timeout is not None:
        raise BadInput("--timeout bounds a wait, and only --wait waits.")


@app.command()
def results(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Submissions and jobs, in any number.")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", help="Print results as jobs finish, until all have.")
    ] = False,
    output: OutputFile = None,
    format_: Annotated[
        Format | None,
        typer.Option("--format", help=f"{FORMATS} Default: table on a terminal, jsonl elsewhere."),
    ] = None,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Print the results of submissions and jobs that have finished, in input order."""
    from producer import fetching
    from producer.place import Place

    if format_ is None:
        format_ = Format.table if output is None and sys.stdout.isatty() else Format.jsonl
    fetching.results(
        Place(redis_url, queue, redis_password_file),
        ids,
        output,
        follow=follow,
        form=format_.value,
    )


@app.command()
def status(
    id_: Annotated[str | None, typer.Argument(metavar="ID", help="A submission or a job.")] = None,
    json: Json = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Show the queue with its workers, or a submission, or a job."""
    from producer import fetching
    from producer.place import Place

    fetching.status(Place(redis_url, queue, redis_password_file), id_, json_wanted=json)


@app.command()
def wait(
    id_: Annotated[str, typer.Argument(metavar="ID", help="A submission or a job.")],
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0, help="Give up after this time."),
    ] = None,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    queue: Queue = "lorry",
) -> None:
    """Wait until a submission or a job has finished."""
    from producer import fetching
    from producer.place import Place

    fetching.wait(Place(redis_url, queue, redis_password_file), id_, timeout)


def main() -> None:
    """The console script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Who closed it (`>&-`) wants nothing of it.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the program.
        getattr(sys, name).reconfigure(errors="backslashreplace")  # A name need not fit the locale.
    # Asked to end, it leaves in order, so that the embedded server does not outlive its last user.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(prog_name="producer")
    finally:
        end_at_once()


if __name__ == "__main__":
    main()
