"""Where results are written: stdout, or a file that bears its name only when it is complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from producer.messages import notice
from schemas.errors import BadInput, LorryError


class Output:
    """stdout, or the file at ``path``.

    A file grows as ``<path>.partial`` and takes its name by ``complete``: whoever finds the name
    finds all results, and an interrupted run leaves what it has beside an earlier complete file.
    A device or a named pipe is written to as it is.
    """

    def __init__(self, path: Path | None, what: str = "Results") -> None:
        """``what`` is written there. Raises BadInput if the file cannot be written."""
        self._what = what
        self.path = None if path is None or str(path) == "-" else path
        #: Where the results are now; None for stdout.
        self.written_to: Path | None = self.path
        self._has_content = False
        self._file: BinaryIO = sys.stdout.buffer
        if self.path is None:
            return
        if self.path.is_file() or not self.path.exists():
            # A link stays one, and its target is replaced. (Path.resolve raises RuntimeError for
            # links in a circle.)
            self.path = Path(os.path.realpath(self.path))
            self.written_to = self.path.with_name(self.path.name + ".partial")
        try:
            self._file = open(self.written_to or self.path, "wb")  # noqa: SIM115 - see __exit__.
        except OSError as error:
            raise BadInput(f"-o {path}: {error.strerror}.") from error

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is None or self.written_to is None:
            return
        with self._disk_errors():
            self._file.close()
            if self.written_to != self.path and not self._has_content:
                self.written_to.unlink(missing_ok=True)

    @property
    def has_partial_file(self) -> bool:
        """Whether some results are in a file that is not complete."""
        return self._has_content and self.written_to is not None

    @property
    def is_file(self) -> bool:
        """Whether it grows as a partial file: stdout, a device and a pipe do not."""
        return self.written_to != self.path

    @property
    def is_terminal(self) -> bool:
        return self.path is None and sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Write at once: a reader at the other end of a pipe waits for every line."""
        with self._disk_errors():
            self._file.write(text.encode(errors="replace"))
            self._file.flush()
            self._has_content = self._has_content or bool(text)

    def complete(self) -> None:
        """Give the file its name. To be called when all results are written."""
        if self.path and self.written_to and self.written_to != self.path:
            with self._disk_errors():
                self._file.close()
                self.written_to.replace(self.path)
            self.written_to = self.path
            if self._has_content:
                notice(f"{self._what} are in {self.path}")
            else:
                notice(f"No {self._what.lower()}: {self.path} is empty")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            where = self.written_to or "stdout"
            raise LorryError(
                f"{self._what} cannot be written to {where}: {error.strerror}."
            ) from error


@dataclass(frozen=True)
class Outputs:
    """Where results are written, and where those of jobs that did not end as done: beside the
    others, if the format has a file for them, else among them."""

    results: Output
    errors: Output

    def complete(self) -> None:
        """As ``Output.complete``: who finds the results finds the errors too."""
        self.errors.complete()
        self.results.complete()

    @property
    def partial_files(self) -> list[Path]:
        """What some results are in while not all are there."""
        outputs = dict.fromkeys((self.results, self.errors))
        return [o.written_to for o in outputs if o.has_partial_file and o.written_to]


@contextmanager
def open_outputs(path: Path | None, *, has_error_file: bool) -> Iterator[Outputs]:
    """stdout, or the file at ``path`` and perhaps the error file beside it. Raises BadInput if they
    cannot be written."""
    with ExitStack() as stack:
        results = stack.enter_context(Output(path))
        errors = results
        if path and has_error_file and results.is_file:
            errors = stack.enter_context(Output(error_file(path), "Errors"))
        yield Outputs(results, errors)


def error_file(path: Path) -> Path:
    """``out.jsonl`` -> ``out.errors.jsonl``"""
    return path.with_name(f"{path.stem}.errors{path.suffix}")
