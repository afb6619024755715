"""How repositories of the hub are named."""

from __future__ import annotations

import pytest

from schemas.hub import HubSource
from tests.fake_hub import commit_of


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("acme/sql", "acme/sql", None),
        ("hf:acme/sql", "acme/sql", None),
        ("acme/sql-lora_v1.5@main", "acme/sql-lora_v1.5", "main"),
        ("hf:acme/sql@refs/pr/3", "acme/sql", "refs/pr/3"),
        (f"acme/sql@{commit_of(7)}", "acme/sql", commit_of(7)),
    ],
)
def test_a_repository_is_read_and_written(text: str, repo: str, revision: str | None) -> None:
    source = HubSource.parse(text)
    assert source
    assert (source.repo, source.revision) == (repo, revision)
    assert str(source) == "hf:" + text.removeprefix("hf:")
    assert HubSource.parse(str(source)) == source
    assert source.is_commit == (revision == commit_of(7))


@pytest.mark.parametrize(
    "text",
    [
        *("", "sql", "/acme/sql", "./acme/sql", "../acme/sql", "acme/sql/v1", "acme/", "/sql"),
        *("acme/..", "../..", "acme/.hidden", "acme/-x", "-x/sql", "acme/a--b", "a--b/sql"),
        *("acme/a..b", "acme/sql.git", "acme/sql.", "acme/s ql", "acme/sql\n", "acme/sql\0"),
        *("acme/sql@", "acme/sql@..", "acme/sql@../../etc", "acme/sql@v1/../x", "acme/sql@/v1"),
        *("acme/sql@a//b", "acme/sql@v1/", "acme/sql@.hidden", "acme/sql@v 1", "acme/sql@a@b"),
        *("hf:hf:acme/sql", "hf:/etc", "hf:", "acme/%2e%2e", "acme\\sql", f"acme/{'x' * 97}"),
        f"acme/sql@{'x' * 201}",
    ],
)
def test_what_could_lead_elsewhere_is_no_repository(text: str) -> None:
    assert HubSource.parse(text) is None
