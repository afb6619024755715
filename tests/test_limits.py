"""A bound on what may wait: kept by the queue, obeyed by all who submit."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import ResponseError

from benchmarks.waiting import PATIENCE
from broker.connection import connect
from broker.job_queue import JobQueue
from broker.outcomes import FullError, Limits, Size
from broker.queue_reader import QueueReader
from producer.advice import counted_bytes
from producer.client import Client
from producer.quantities import parse_size
from schemas.errors import BadInput, QueueFull
from schemas.job import Job
from tests.test_job_queue import claim, join, result
from tests.test_producer_cli import Producer, prompts


@pytest.fixture
def producer(redis_url: str, queue_name: str) -> Producer:
    return Producer(redis_url, queue_name)


@pytest.fixture
def client(redis_url: str, queue_name: str) -> Iterator[Client]:
    with Client(redis_url, queue_name) as client:
        yield client


def numbered(count: int, prompt: str = "x", prefix: str = "job") -> list[Job]:
    return [Job(id=f"{prefix}-{i}", prompt=prompt) for i in range(count)]


def finish(queue: JobQueue, number: int) -> None:
    claims = claim(queue, number)
    queue.commit("w", [(job.lease, result(job)) for job in claims])


def test_a_full_queue_takes_nothing_of_a_run_and_says_how_much_fits(
    queue: JobQueue, reader: QueueReader
) -> None:
    queue.set_limits(Limits(jobs=5))
    queue.submit("first", "file", 3, 0, numbered(3, prefix="first"))
    with pytest.raises(FullError) as full:
        queue.submit("second", "file", 4, 0, numbered(4))
    assert full.value.num_fitting == 2
    assert full.value.waiting.jobs == 3
    assert full.value.limits == Limits(5, None)
    assert list(reader.payloads(["job-0"])) == [None]
    queue.submit("second", "file", 4, 0, numbered(2))
    assert reader.backlog().jobs == 5


def test_bytes_are_bounded_too(queue: JobQueue, reader: QueueReader) -> None:
    size = len(numbered(1, "x" * 100)[0].to_wire())
    queue.set_limits(Limits(bytes=3 * size))
    with pytest.raises(FullError) as full:
        queue.submit("sub", "file", 4, 0, numbered(4, "x" * 100))
    assert full.value.num_fitting == 3
    queue.submit("sub", "file", 4, 0, numbered(3, "x" * 100))
    assert reader.backlog() == Size(3, 3 * size)


def test_room_is_made_by_claims_and_by_cancelling(queue: JobQueue, reader: QueueReader) -> None:
    join(queue)
    queue.set_limits(Limits(jobs=2))
    queue.submit("sub", "file", 2, 0, numbered(2))
    (running,) = claim(queue, 1)
    assert reader.backlog().jobs == 1
    queue.submit("more", "file", 1, 0, numbered(1, prefix="more"))
    queue.cancel(["more-0"])
    queue.submit("again", "file", 1, 0, numbered(1, prefix="again"))
    queue.commit("w", [(running.lease, result(running))])
    with pytest.raises(FullError):
        queue.submit("last", "file", 1, 0, numbered(1, prefix="last"))


def test_what_is_sent_again_needs_no_room(queue: JobQueue, reader: QueueReader) -> None:
    queue.submit("sub", "file", 3, 0, numbered(3))
    queue.set_limits(Limits(jobs=1))
    queue.submit("again", "file", 3, 0, numbered(3))
    assert reader.submission("again").counts["waiting"] == 3
    assert reader.backlog().jobs == 3


def test_a_run_whose_reply_was_lost_is_not_refused_for_itself(queue: JobQueue) -> None:
    queue.set_limits(Limits(jobs=3))
    queue.submit("sub", "file", 3, 0, numbered(3))
    queue.submit("sub", "file", 3, 0, numbered(3))


def test_a_job_that_has_lost_its_prompt_is_not_counted_again(
    queue: JobQueue, reader: QueueReader
) -> None:
    join(queue)
    queue.submit("sub", "file", 1, 0, numbered(1))
    queue.client.hdel(queue.keys.job("job-0"), "job")
    for submission in ("second", "third"):
        queue.submit(submission, "file", 1, 0, numbered(1))
        assert reader.backlog().jobs == 1
    finish(queue, 1)
    assert reader.backlog() == Size(0, 0)


def test_a_file_that_does_not_fit_is_refused_before_any_of_it_is_sent(client: Client) -> None:
    client.set_limits(Limits(jobs=900))
    with pytest.raises(QueueFull) as refused:
        client.submit(["x"] * 1000, when_full="refuse")
    assert str(refused.value).startswith(
        "0 jobs of 0 bytes wait, and at most 900 jobs may, so there is no room for 1000 jobs ("
    )
    assert str(refused.value).endswith(
        "; nothing was sent. `wait` instead of `refuse` sends them as there is room."
    )
    assert client.overview().num_submissions == 0
    client.submit(["x"] * 900, when_full="refuse")


def test_a_file_that_just_fits_is_not_refused(client: Client) -> None:
    client.submit(["x"] * 600)
    size = client.overview().backlog.bytes
    client.set_limits(Limits(bytes=2 * size - 1))
    with pytest.raises(QueueFull):
        client.submit(["x"] * 600, when_full="refuse")
    client.set_limits(Limits(bytes=2 * size))
    client.submit(["x"] * 600, when_full="refuse")
    assert client.overview().backlog == (1200, 2 * size)


def test_a_file_larger_than_the_bound_is_sent_as_there_is_room(
    client: Client, redis_url: str
) -> None:
    client.set_limits(Limits(jobs=70))
    reasons: list[str] = []
    most_waiting = 0
    stop = threading.Event()

    def work_off() -> None:
        nonlocal most_waiting
        with connect(redis_url) as connection:
            queue = JobQueue(connection, client.queue)
            reader = QueueReader(connection, client.queue)
            join(queue)
            while not stop.is_set():
                most_waiting = max(most_waiting, reader.backlog().jobs)
                finish(queue, 50)
                time.sleep(0.01)

    thread = threading.Thread(target=work_off)
    with client.prepare(enumerate(["x"] * 600, 1), name="file") as spool:
        thread.start()
        client.send(spool, on_full=reasons.append)
        status = client.wait(spool.submission, timeout=PATIENCE)
    stop.set()
    thread.join()
    assert status.counts["done"] == 600  # type: ignore[union-attr]
    assert most_waiting <= 70
    assert reasons
    assert "wait, and at most 70 jobs may." in reasons[0]


def test_the_wait_for_room_ends_with_the_time_given(client: Client) -> None:
    client.set_limits(Limits(jobs=70))
    long = client.prepare(enumerate(["x"] * 100, 1), name="file")
    with long, pytest.raises(QueueFull) as late:
        client.send(long, timeout=0)
    assert "there was no room within the time given. 70 of 100 jobs are known" in str(late.value)
    assert f"`producer cancel {long.submission}`" in str(late.value)
    short = client.prepare(enumerate(["x"], 1), name="file")
    with short, pytest.raises(QueueFull, match="within the time given; nothing was sent"):
        client.send(short, timeout=0)


def test_a_timeout_of_submit_bounds_the_wait_for_room_too(
    producer: Producer, client: Client, tmp_path: Path
) -> None:
    client.set_limits(Limits(jobs=1))
    file = prompts(tmp_path, '"first"', '"second"')
    outcome = producer("submit", file, "--wait", "--timeout", "0.1")
    assert outcome.exit_code == QueueFull.exit_code
    assert "within the time given. 1 of 2 jobs are known to have been sent" in outcome.stderr


def test_several_who_submit_never_exceed_the_bound_together(
    redis_url: str, queue: JobQueue, reader: QueueReader
) -> None:
    queue.set_limits(Limits(jobs=100))
    outcomes: list[bool] = []

    def send(number: int) -> None:
        with connect(redis_url) as connection:
            mine = JobQueue(connection, queue.name)
            for i in range(20):
                try:
                    prefix = f"{number}-{i}"
                    mine.submit(prefix, "file", 3, 0, numbered(3, prefix=prefix))
                    outcomes.append(True)
                except FullError:
                    outcomes.append(False)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 80
    assert sum(outcomes) == 33
    assert reader.backlog().jobs == 99


def test_a_queue_that_fills_up_meanwhile_says_what_was_sent(
    client: Client, queue: JobQueue
) -> None:
    client.set_limits(Limits(jobs=800))

    def fill_up(number: int) -> None:
        if number == 500:
            queue.submit("other", "file", 200, 0, numbered(200, prefix="other"))

    lines = enumerate(["x"] * 700, 1)
    with client.prepare(lines, name="file", when_full="refuse") as spool:
        with pytest.raises(QueueFull) as refused:
            client.send(spool, fill_up)
        assert (
            "others sent meanwhile. 500 of 700 jobs are known to have been sent, as submission"
            f" {spool.submission}. `producer cancel {spool.submission}` takes them back."
        ) in str(refused.value)
        status = client.status(spool.submission)
        assert (status.sent, status.total) == (500, 700)  # type: ignore[union-attr]
        client.cancel(spool.submission)
        assert client.status(spool.submission).is_complete  # type: ignore[union-attr]


def test_a_job_larger_than_all_that_may_wait_is_refused_at_once(client: Client) -> None:
    client.set_limits(Limits(bytes=1000))
    with pytest.raises(BadInput, match=r"has 1\d\d\d bytes, and at most 1 kB may wait"):
        client.submit(["x" * 1000])


def test_a_job_that_is_stored_already_is_not_blamed_for_being_too_large(
    client: Client, reader: QueueReader
) -> None:
    large = {"id": "large", "prompt": "x" * 1000}
    client.submit([large])
    client.set_limits(Limits(bytes=500))
    with client.prepare(enumerate([large, "y"], 1), name="file") as spool:
        with pytest.raises(QueueFull, match="no room within the time given"):
            client.send(spool, timeout=0.1)
        assert reader.submission(spool.submission).counts["waiting"] == 1, "large needs no room"


def test_a_refused_line_is_not_blamed_for_being_too_large(client: Client, tmp_path: Path) -> None:
    request = {"custom_id": "x" * 1000, "method": "GET", "url": "/", "body": {}}
    client.submit(["y" * 100])
    client.set_limits(Limits(bytes=200))
    lines = enumerate([request, "z" * 100], 1)
    with (
        client.prepare(lines, name="file", lenient=True) as spool,
        pytest.raises(QueueFull, match=r"no room within the time given\. 1 of 2 jobs"),
    ):
        client.send(spool, timeout=0.1)


def test_the_command_sets_shows_and_lifts_bounds(
    producer: Producer, reader: QueueReader, tmp_path: Path
) -> None:
    queue = f"Queue '{producer.queue}': "
    assert producer("limits").stdout == f"{queue}0 jobs of 0 bytes wait, and any number may.\n"
    told = producer("limits", "--jobs", "2", "--bytes", "5M").stdout
    assert told == f"{queue}0 jobs of 0 bytes wait, and at most 2 jobs and 5 MB may.\n"
    file = prompts(tmp_path, '"a"', '"b"', '"c"')
    refused = producer("submit", file, "--when-full", "refuse")
    assert refused.exit_code == 7
    assert "so there is no room for 3 jobs" in refused.stderr
    assert "at most 2 jobs and 5 MB may." in producer("status").stdout
    producer("limits", "--jobs", "none")
    shown = json.loads(producer("limits", "--json").stdout)
    assert shown == {
        "waiting": {"jobs": 0, "bytes": 0},
        "limits": {"jobs": None, "bytes": 5_000_000},
    }
    assert producer("submit", file, "--when-full", "refuse").exit_code == 0


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5K"])
def test_a_wrong_bound_is_refused(producer: Producer, reader: QueueReader, value: str) -> None:
    assert producer("limits", "--jobs", value).exit_code == 2
    assert reader.limits() == Limits()


def test_bytes_are_told_in_the_units_that_bounds_are_typed_in() -> None:
    told = [counted_bytes(n) for n in (0, 1, 999, 1000, 2_000_000_000, 1_250_000)]
    assert told == ["0 bytes", "1 byte", "999 bytes", "1 kB", "2 GB", "1.2 MB"]


def test_bytes_that_round_to_1000_of_a_unit_are_told_as_1_of_the_next() -> None:
    told = [counted_bytes(n) for n in (999_949, 999_950, 999_999, 999_949_999, 999_950_000)]
    assert told == ["999.9 kB", "1 MB", "1 MB", "999.9 MB", "1 GB"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [("1250K", "1250 kB"), ("999999", "999999 bytes"), ("1", "1 byte"), ("3000M", "3 GB")],
)
def test_a_bound_is_told_as_it_was_set(producer: Producer, typed: str, told: str) -> None:
    assert f"and at most {told} may.\n" in producer("limits", "--bytes", typed).stdout


def test_sizes_are_numbers_that_may_have_a_unit() -> None:
    assert [parse_size(text, "--x") for text in ("7", "2K", "3M", "1G", "none")] == [
        *(7, 2_000, 3_000_000, 1_000_000_000, None)
    ]


@pytest.mark.parametrize("wrong", ["priority", "deadline", "result_ttl"])
def test_a_record_that_no_script_could_use_is_refused_whole(
    queue: JobQueue, reader: QueueReader, wrong: str
) -> None:
    """From a program that does not use the Python client."""
    given = {"priority": "normal", "deadline": "", "result_ttl": "1000"} | {wrong: "soon"}
    jobs = [
        *("first", "@base", "normal", "", "{}", ""),
        *("second", "@base", given["priority"], given["deadline"], "{}", ""),
    ]
    with pytest.raises(ResponseError, match="soon"):
        queue._run("submit", "sub", "file", 2, 0, given["result_ttl"], 0, 0, "", *jobs)
    assert list(queue.client.scan_iter(match=queue.keys.prefix + "*")) == []


def test_another_way_with_a_full_queue_than_the_two_is_refused(client: Client) -> None:
    with pytest.raises(BadInput, match=r"^when_full: should be 'wait' or 'refuse' "):
        client.submit(["x"], when_full="maybe")  # type: ignore[arg-type]


def test_jobs_that_lack_a_field_are_refused_whole(queue: JobQueue) -> None:
    jobs = ("first", "@base", "normal", "", "{}")
    with pytest.raises(ResponseError, match="six arguments a job are needed"):
        queue._run("submit", "sub", "file", 1, 0, "1000", 0, 0, "", *jobs)
    assert list(queue.client.scan_iter(match=queue.keys.prefix + "*")) == []
