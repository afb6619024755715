"""The forms in which results are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Literal

from producer.client import Client
from producer.openai_responses import line
from producer.output import Output, Outputs
from schemas.result import Result

#: Result lines; those of OpenAI's batches, with an error file; or a table for people.
ResultFormat = Literal["jsonl", "openai", "table"]

#: Writes results, and what belongs to them, to where they were asked for.
WriteResults = Callable[[Sequence[Result]], None]


def has_error_file(form: ResultFormat) -> bool:
    """Whether jobs that did not end as done have a file of their own."""
    return form == "openai"


def writer(form: ResultFormat, client: Client, outputs: Outputs) -> WriteResults:
    """Writes results in this form."""
    if form == "table":
        return _table_writer(client, outputs)
    return _openai_writer(client, outputs) if form == "openai" else _line_writer(outputs)


def _line_writer(outputs: Outputs) -> WriteResults:
    return lambda found: outputs.results.write("".join(f"{r.model_dump_json()}\n" for r in found))


def _openai_writer(client: Client, outputs: Outputs) -> WriteResults:
    # Asked by the first line that tells it: before it, no worker need have joined.
    base_model = cache(client.base_model)

    def output_of(result: Result) -> Output:
        return outputs.results if result.status == "done" else outputs.errors

    def write(found: Sequence[Result]) -> None:
        for output, run in groupby(found, output_of):
            output.write(
                "".join(f"{json.dumps(line(r, base_model), ensure_ascii=False)}\n" for r in run)
            )

    return write


def _table_writer(client: Client, outputs: Outputs) -> WriteResults:
    from producer.tables import ResultTable

    table = ResultTable(for_terminal=outputs.results.is_terminal)

    def write(found: Sequence[Result]) -> None:
        payloads = client.payloads([result.id for result in found])
        outputs.results.write(table.rows(found, payloads))

    return write
