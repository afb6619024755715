"""Sampling fields through the whole engine, against transformers on the same tiny model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from schemas.errors import JobError
from schemas.job import Job
from tests.test_engine import launching_ahead, make_engine
from tests.tiny_models import Oracle, make_adapter, make_llama
from worker import engine as engine_module
from worker import scheduler
from worker.engine import Engine
from worker.sampler import Sampler
from worker.sequence import Phase, Sequence

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")

PROMPT = random.Random(8).choices(range(211), k=70)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("head")
    modules = ["q_proj", "down_proj", "lm_head"]
    return {"head": make_adapter(model_folder, folder, rank=4, seed=1, target_modules=modules)}


@pytest.fixture(scope="module")
def oracle(model_folder: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_folder, adapters)


@pytest.fixture(params=["known", "ahead", "preempting"])
def engine(request: pytest.FixtureRequest, model_folder: Path, adapters: dict[str, Path]) -> Engine:
    """Launched one by one, or before the last tokens are known, or with too few pages as well."""
    flags = {"max_total_tokens": 208} if request.param == "preempting" else {}
    made = make_engine(model_folder, adapters, lora_target_modules=("all",), **flags)
    return made if request.param == "known" else launching_ahead(made)


def job(id_: str, **fields: object) -> Job:
    return Job.model_validate({"id": id_, "prompt_token_ids": PROMPT, "max_tokens": 24, **fields})


def run(engine: Engine, jobs: list[Job]) -> dict[str, Sequence]:
    for each in jobs:
        engine.add(engine.sequence_of(each))
    finished: dict[str, Sequence] = {}
    while len(finished) < len(jobs):
        for sequence in engine.step():
            assert sequence.job.id not in finished
            finished[sequence.job.id] = sequence
    engine.collect(all_launched=True)
    assert engine.scheduler.pool.num_used == 0
    return finished


def test_an_end_token_that_the_model_cannot_write_is_not_banned_before_min_tokens(
    tmp_path: Path,
) -> None:
    made = make_engine(make_llama(tmp_path, eos_token_id=[-1, 3, 211]), {})
    (sequence,) = run(made, [job("a", min_tokens=24)]).values()
    assert len(sequence.output_ids) == 24


def test_penalties_and_bans_give_the_tokens_that_transformers_gives(
    engine: Engine, oracle: Oracle
) -> None:
    jobs, expected = [], {}
    for number, penalty in enumerate((1.0, 1.2, 1.5)):
        prompt = PROMPT[number:]
        free = oracle.generate(prompt, None, 24, repetition_penalty=penalty)
        jobs.append(job(f"{penalty}", prompt_token_ids=prompt, repetition_penalty=penalty))
        expected[f"{penalty}"] = free
        # What it would say first is made unlikely, and another token likely.
        bias = {free[0]: -100.0, 7: 3.0}
        fields = {"repetition_penalty": penalty, "logit_bias": {str(k): v for k, v in bias.items()}}
        jobs.append(job(f"{penalty}-biased", prompt_token_ids=prompt, **fields))
        sequence_bias = {(token,): value for token, value in bias.items()}
        expected[f"{penalty}-biased"] = oracle.generate(
            prompt, None, 24, repetition_penalty=penalty, sequence_bias=sequence_bias
        )
    found = run(engine, jobs)
    assert {id_: sequence.output_ids for id_, sequence in found.items()} == expected


@pytest.mark.parametrize("lora", [None, "head"])
def test_log_probabilities_are_those_of_transformers(
    engine: Engine, oracle: Oracle, lora: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a prompt in chunks, while others draw and are penalized."""
    monkeypatch.setattr(scheduler, "MAX_SCORED_ROWS", 13)
    jobs = [
        job("both", lora=lora, logprobs=5, prompt_logprobs=3),
        job("answer", lora=lora, logprobs=True),
        job("other", logprobs=True, top_logprobs=2, presence_penalty=1.5, temperature=1.0),
        job("prompt", prompt_logprobs=0, lora=lora),
        job("none", temperature=0.7),
    ]
    found = run(engine, jobs)
    for each in jobs:
        sequence = found[each.id]
        text = sequence.prompt_ids + sequence.output_ids
        expected = torch.log_softmax(oracle.all_logits(text, each.lora), dim=-1)[:-1]
        of_prompt = expected[: len(PROMPT) - 1], text[1 : len(PROMPT)], sequence.prompt_logprobs
        of_answer = expected[len(PROMPT) - 1 :], text[len(PROMPT) :], sequence.logprobs
        for wanted, part in ((each.prompt_logprobs, of_prompt), (each.num_logprobs, of_answer)):
            rows, tokens, numbers = part
            if wanted is None:
                assert not numbers
                continue
            assert len(numbers) == len(tokens)
            top = rows.topk(wanted) if wanted else None
            for place, (token, told) in enumerate(zip(tokens, numbers, strict=True)):
                assert told.logprob == pytest.approx(rows[place, token].item(), abs=1e-4)
                assert told.top_ids == (top.indices[place].tolist() if top else [])
                values = top.values[place].tolist() if top else []
                assert told.top_logprobs == pytest.approx(values, abs=1e-4)


def test_a_prompt_that_stands_in_the_cache_is_computed_for_its_log_probabilities(
    engine: Engine,
) -> None:
    first = run(engine, [job("first", prompt_logprobs=0)])["first"]
    run(engine, [job("plain")])
    again = run(engine, [job("again", prompt_logprobs=0)])["again"]
    assert again.num_reused == 0
    assert len(again.prompt_logprobs) == len(PROMPT) - 1
    numbers = [told.logprob for told in first.prompt_logprobs]
    assert [told.logprob for told in again.prompt_logprobs] == pytest.approx(numbers, abs=1e-4)


SPECIAL: list[dict[str, object]] = [
    {"temperature": 1.2, "seed": 5, "frequency_penalty": 0.7},
    {"temperature": 0.9, "seed": 6, "min_p": 0.05, "repetition_penalty": 1.2, "n": 3},
    {"temperature": 1.0, "min_tokens": 20, "stop_token_ids": list(range(100))},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "logit_bias": {"5": 4.0}, "logprobs": 2},
    {"temperature": 1.0, "n": 4},
    {},
]


def answers(sequence: Sequence) -> list[list[int]]:
    return [answer.output_ids for answer in sequence.answers]


def test_a_job_gives_the_same_tokens_alone_and_in_any_batch(
    engine: Engine, model_folder: Path
) -> None:
    jobs = [job(f"{number}", **fields) for number, fields in enumerate(SPECIAL)]
    together = run(engine, jobs)
    alone = make_engine(model_folder, {}, disable_prefix_cache=True)
    for each in jobs:
        assert answers(run(alone, [each])[each.id]) == answers(together[each.id])


def test_jobs_that_only_take_the_likeliest_token_never_come_to_the_sampler(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise AssertionError("nothing is asked for")

    monkeypatch.setattr(Sampler, "choose", refuse)
    plain = {"stop_token_ids": [3], "ignore_eos": True, "top_p": 0.5, "top_k": 3, "min_p": 0.5}
    run(engine, [job(f"{number}", **plain) for number in range(4)])


# --- Several answers ----------------------------------------------------------------------------


def test_answers_differ_and_the_first_is_that_of_a_job_for_one(engine: Engine) -> None:
    drawing = {"temperature": 1.0, "seed": 3}
    several = run(engine, [job("a", n=5, **drawing)])["a"]
    (one,) = answers(run(engine, [job("b", **drawing)])["b"])
    assert answers(several)[0] == one
    assert len({tuple(ids) for ids in answers(several)}) == 5
    assert [answer.index for answer in several.answers] == list(range(5))


def test_answers_share_their_prompts_pages(model_folder: Path) -> None:
    engine = make_engine(model_folder, {})
    run(engine, [job("a", n=8, max_tokens=2)])
    # 64 of the 70 tokens fill pages; the rest each computes for itself.
    assert engine.counters.prompt_tokens == len(PROMPT) + 7 * 6


def test_more_answers_than_may_run_are_all_made(model_folder: Path) -> None:
    engine = make_engine(model_folder, {}, max_running_requests=3)
    found = run(engine, [job("a", n=10, temperature=1.0, max_tokens=5), job("b", max_tokens=5)])
    assert [len(ids) for ids in answers(found["a"])] == 10 * [5]


def test_a_dropped_job_takes_all_its_answers_along(engine: Engine) -> None:
    dropped = engine.sequence_of(job("a", n=30, temperature=1.0))
    engine.add(dropped)
    for _ in range(5):
        engine.step()
    engine.drop(dropped)
    assert {answer.phase for answer in dropped.answers} == {Phase.FINISHED}
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert list(run(engine, [job("b")])) == ["b"]


def test_an_answer_that_fails_ends_the_job_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_finished = engine._is_finished

    def failing(sequence: Sequence, token_id: int, now: float) -> bool:
        if sequence.index == 2 and len(sequence.output_ids) == 4:
            token_id = -1
        return is_finished(sequence, token_id, now)

    monkeypatch.setattr(engine, "_is_finished", failing)
    found = run(engine, [job("a", n=4, temperature=1.0), job("b")])
    assert found["a"].error is engine_module.NOT_FINITE
    assert not engine.scheduler.running
    assert found["b"].error is None


def test_bans_that_leave_no_token_fail_the_job_and_say_so(engine: Engine) -> None:
    every = list(range(211))
    found = run(
        engine,
        [
            job("a", stop_token_ids=every, min_tokens=1),
            job("b", stop_token_ids=every[1:], min_tokens=3, max_tokens=3),
            job("c"),
        ],
    )
    assert found["a"].error is engine_module.ALL_BANNED
    assert found["b"].output_ids == [0, 0, 0]
    assert found["b"].error is found["c"].error is None


# --- Ends ---------------------------------------------------------------------------------------


def test_a_stop_token_ends_an_answer_but_not_before_min_tokens(engine: Engine) -> None:
    free = run(engine, [job("free")])["free"].output_ids
    stop = free[3]
    jobs = [
        job("stopped", stop_token_ids=[stop]),
        job("late", stop_token_ids=[stop], min_tokens=10),
    ]
    found = run(engine, jobs)
    assert found["stopped"].output_ids == free[: free.index(stop) + 1]
    assert (found["stopped"].finish_reason, found["stopped"].has_end_token) == ("stop", True)
    assert stop not in found["late"].output_ids[:10]
    assert len(found["late"].output_ids) > 10


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"211": 1.0}}, "logit_bias holds token 211; the model's vocabulary has"),
        ({"stop_token_ids": [3, 500]}, "stop_token_ids holds token 500; the model's vocabulary"),
        ({"bad_words": ["x"]}, "holds no tokenizer; leave out bad_words"),
        ({"stop": ["x"]}, "holds no tokenizer; leave out stop"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    model_folder: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        make_engine(model_folder, {}).sequence_of(job("a", **fields))


def test_more_log_probabilities_than_a_result_holds_are_refused_with_both_numbers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_LOGPROBS", 1000)
    engine = make_engine(model_folder, {})
    engine.sequence_of(job("a", n=2, max_tokens=10, logprobs=5, prompt_logprobs=11))
    with pytest.raises(JobError, match="come to 1030 log probabilities; 1000 are allowed"):
        engine.sequence_of(job("a", n=2, max_tokens=10, logprobs=5, prompt_logprobs=12))
