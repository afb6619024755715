"""What the tests ask of workers that serve adapters, and wait for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from benchmarks.waiting import PATIENCE, wait_until
from producer.adapter_states import AdapterStatus
from producer.adapters import Answer, Change
from producer.client import Client
from tests.tiny_models import Oracle

PROMPT = (5, 6, 7)
NUM_TOKENS = 12


def wait_for_workers(client: Client, count: int) -> list[str]:
    """Their ids, once so many are alive, and no more."""
    wait_until(lambda: len(client.overview().workers) == count, "the workers did not come up")
    return [worker.id for worker in client.overview().workers]


def wait_until_running(client: Client, submission: str) -> None:
    """Return when a job of it runs."""
    wait_until(lambda: client.status(submission).counts["running"] > 0)  # type: ignore[union-attr]


def answers(client: Client, change: Change, *, workers: int = 2) -> list[Answer]:
    found = client.answers(change, timeout=PATIENCE)
    assert len(found) == workers
    return found


def succeed(client: Client, change: Change, *, workers: int = 2) -> dict[str, str]:
    """The adapters that all workers have after a command."""
    found = answers(client, change, workers=workers)
    assert [answer.error_message for answer in found] == [None] * workers
    assert all(answer.success for answer in found)
    loaded = [answer.loaded_adapters for answer in found]
    assert all(adapters == loaded[0] for adapters in loaded)
    return loaded[0]


def status_of(client: Client, name: str) -> AdapterStatus:
    (status,) = [adapter for adapter in client.adapters() if adapter.name == name]
    return status


def job(lora: str | None, max_tokens: int = NUM_TOKENS) -> dict[str, object]:
    return {"prompt_token_ids": list(PROMPT), "lora": lora, "max_tokens": max_tokens}


@cache
def expected_tokens(oracle: Oracle, adapter: str | None, num_tokens: int = NUM_TOKENS) -> list[int]:
    """What PEFT answers to ``job``."""
    return oracle.generate(PROMPT, adapter, num_tokens)


def assert_answers(
    client: Client, oracle: Oracle, expected: Mapping[str | None, str | None]
) -> None:
    """Jobs of each name, in one submission, are answered as the oracle's adapter answers."""
    submission = client.submit([job(name) for name in expected for _ in range(3)])
    client.wait(submission, timeout=PATIENCE)
    for result in client.results(submission):
        assert result.status == "done", result.error
        assert result.token_ids == expected_tokens(oracle, expected[result.lora]), result.lora
        assert (result.revision is None) == (result.lora is None)
