"""The pages that say what holds name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Names of all test functions.
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", file.read_text("utf-8"), re.MULTILINE)
}

PAGES = ("README.md", "docs/promises.md", "docs/faults.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_tests_that_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    names = re.findall(r"`(test_\w+)`", text)
    assert names
    assert set(names) <= TESTS
    for beginning in re.findall(r"`(test_\w+?)_?\.\.\.`", text):
        assert any(name.startswith(beginning) for name in TESTS), beginning
    for path in re.findall(r"`(tests/[\w/]*(?:\.py)?)`", text):
        assert (ROOT / path).exists(), path


def test_every_promise_has_its_tests() -> None:
    page = (ROOT / "docs/promises.md").read_text("utf-8").partition("## Not promised")[0]
    _, *promises = page.split("\n### ")
    assert len(promises) > 5
    for promise in promises:
        assert re.search(r"^- .*`tests?[_/]", promise, re.MULTILINE), promise.splitlines()[0]
