"""The engine: sequences in, finished sequences out, one batch a step."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

import structlog

from kernels.largest_token import NO_TOKEN
from schemas.errors import BadInput, JobError
from schemas.job import Job
from worker.adapters.at_start import load_registry
from worker.adapters.loader import AdapterLoader, find_limits
from worker.adapters.peft_format import Adapter
from worker.adapters.residency import AdapterResidency
from worker.adapters.sources import find_adapters
from worker.assembly import build_runner, bytes_to_run, load_weights_and_slots
from worker.batch import Batch, build_batch
from worker.config import WorkerConfig
from worker.device_memory import set_up_allocators
from worker.kv_cache import PAGE_SIZE, pages_that_fit
from worker.logits_processors import logits_processors
from worker.model.config import ModelConfig
from worker.model_place import repository_in
from worker.model_runner import Launched
from worker.page_pool import PagePool, prefix_keys
from worker.scheduler import Scheduler
from worker.sequence import Phase, Sequence
from worker.stop_strings import StopSearch
from worker.text import Tokenizer

log = structlog.get_logger()

#: Log probabilities in one result. With a token's text and bytes each takes some 90 bytes of JSON,
#: so that this many take 45 MB on the server.
MAX_LOGPROBS = 500_000


@dataclass
class EngineCounters:
    """What the engine has done so far."""

    batches: int = 0
    prompt_tokens: int = 0
    """Those that were computed."""
    reused_tokens: int = 0
    """Those of prompts that stood in the cache already."""
    output_tokens: int = 0
    device_seconds: float = 0.0
    """Time in which a GPU worked on batches."""
    max_adapters_in_batch: int = 0
    """Largest number of distinct adapters in one batch."""


NOT_FINITE = JobError(
    "not_finite",
    "the model gave no finite logits: its weights or the adapter's, or their products in this"
    " dtype, are too large",
)

ALL_BANNED = JobError(
    "bad_sampling",
    "no token is left to go on with: bad_words, and before min_tokens the tokens that would end the"
    " answer, leave out the whole vocabulary",
)


class Engine:
    """Model, adapters, KV cache and scheduler of one worker."""

    def __init__(self, config: WorkerConfig) -> None:
        """Load everything; raises BadInput for what a person must mend."""
        self.device = config.resolved_device
        if self.device.type == "cuda":
            set_up_allocators()
        model = ModelConfig.from_folder(config.model_path)
        self.dtype = config.resolved_dtype(model.dtype)
        self.context_length = _context_length(config, model)
        self.tokenizer = Tokenizer(config.model_path, model.vocab_size)
        found = find_adapters(config.lora_paths)
        limits = find_limits(config, found, model)
        weights, self.slots = load_weights_and_slots(config, model, limits, self.device, self.dtype)
        repository = config.repository or repository_in(config.model_path)
        self.adapters = load_registry(
            config,
            found,
            AdapterLoader(model, weights, limits, repository),
            self.slots.memory.prepare if self.slots else None,
        )
        build = partial(build_runner, config, model, weights, self.slots, self.context_length)
        pages = pages_that_fit(
            config, model, self.dtype, self.context_length, partial(bytes_to_run, build)
        )
        self._runner = build(pages)
        pool = PagePool(pages)
        self._launched: deque[Launched] = deque()
        # While a GPU computes a batch the next one is scheduled and launched behind it.
        self._max_launched = 1 if self.device.type == "cuda" else 0
        self._shares_prefixes = not config.disable_prefix_cache
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._vocab_size = model.vocab_size
        self.scheduler = Scheduler(
            pool,
            max_running=config.running_limit,
            max_prefill_tokens=config.prefill_limit,
            max_adapters=config.max_loras_per_batch,
            patience=config.patience,
        )
        self.counters = EngineCounters()
        self._residency = None
        if self.slots:
            self._residency = AdapterResidency(self.adapters, self.slots, self.scheduler)
            self._residency.follow()
        log.info(
            "engine_ready",
            model=config.model_name,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            context_length=self.context_length,
            kv_cache_tokens=pool.num_pages * PAGE_SIZE,
            adapters=sorted(self.adapters.revisions),
            slots=self.slots.num_slots if self.slots else 0,
            slot_ranks=self.slots.capacity if self.slots else 0,
        )
        if self.kv_capacity < self.context_length:
            log.warning(
                "kv_cache_below_context",
                problem=f"a job whose prompt and max_tokens come to more than {self.kv_capacity}"
                " tokens fails",
                remedy="--max-total-tokens, or --mem-fraction-static",
            )

    def sequence_of(self, job: Job, adapter: Adapter | None = None) -> Sequence:
        """Prepare a job to run; raises JobError if it cannot. Safe to call from another thread.

        Returns the first of its sequences. ``adapter``: that of the job, if it was read before.
        """
        adapter = adapter or self.adapter_of(job)
        prompt_ids = self.tokenizer.encode(job)
        room = self.context_length - len(prompt_ids)
        if room < 1:
            raise JobError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens; with one to answer, a context of"
                f" {self.context_length} holds {self.context_length - 1}",
            )
        max_new_tokens = min(job.max_tokens, room)
        self._check_size(job, len(prompt_ids), max_new_tokens)
        self._check_token_ids(job)
        ends = frozenset(job.stop_token_ids)
        if not job.ignore_eos:
            ends |= self._eos_token_ids
        bad_words = self.tokenizer.spellings(job.bad_words) if job.bad_words else []
        answer = partial(
            Sequence,
            job,
            prompt_ids,
            max_new_tokens,
            adapter,
            end_token_ids=ends,
            processors=logits_processors(job, ends, bad_words),
        )
        first = answer(stop_search=self._stop_search(job))
        first.others = [
            answer(stop_search=self._stop_search(job), index=index, first=first)
            for index in range(1, job.n)
        ]
        if self._shares_prefixes:
            revision = adapter.revision if adapter else None
            keys = prefix_keys(revision, prompt_ids, PAGE_SIZE)
            for sequence in first.answers:
                # Logits of a prompt come from computing it: nothing of it may be skipped.
                sequence.prefix_keys = [] if sequence.num_unscored else keys
        return first

    def adapter_of(self, job: Job) -> Adapter | None:
        """The adapter that a job names, read if it was evicted; raises JobError if it cannot be
        had. Safe to call from other threads."""
        if job.lora is None:
            return None
        adapter = self.adapters.get(job.lora)
        if adapter is None:
            known = ", ".join(sorted(self.adapters.revisions)) or "none"
            raise JobError(
                "unknown_adapter",
                f"no adapter is called '{job.lora}'; this worker serves: {known}",
            )
        return adapter

    def add(self, sequence: Sequence) -> None:
        """Let a job's sequences wait for their turn; they are named by its first one here."""
        for answer in sequence.answers:
            self.scheduler.add(answer)

    def schedule(self) -> Batch | None:
        """The next batch, laid out; None if there is nothing to launch."""
        if self._residency:
            self._residency.follow()
        scheduled = self.scheduler.schedule()
        new_pages = self.scheduler.pool.take_new()
        if not scheduled:
            return None
        if new_pages and self.device.type == "cpu":
            self._runner.decoder.kv_cache.clear(new_pages)
        now = time.monotonic()
        for sequence, _, _ in scheduled:
            if sequence.started is None:
                sequence.started = now
                self.counters.reused_tokens += sequence.num_reused
        return build_batch(scheduled, self.slots)

    def launch(self, batch: Batch) -> None:
        """Start a batch: forward pass and choice of tokens."""
        self._launched.append(self._runner.launch(batch))
        for sequence, num_rows, _ in batch.scheduled:
            sequence.num_cached += num_rows
        for sequence in batch.sampled:
            sequence.num_in_flight += 1
        self._count(batch)
        if self.slots and self._residency:
            self.slots.note_launched(batch.adapters)
            self._residency.prefetch()

    def collect(self, *, all_launched: bool = False) -> list[Sequence]:
        """Enter the tokens of launched batches; returns the sequences that are finished by them,
        of a job for several answers the first, once all are.

        On a GPU the newest batch is left to run, unless ``all_launched``.
        """
        finished = []
        while len(self._launched) > (0 if all_launched else self._max_launched):
            finished += self._collect(self._launched.popleft())
        return finished

    def step(self) -> list[Sequence]:
        """Launch a batch and collect; returns the sequences that are finished."""
        batch = self.schedule()
        if batch:
            self.launch(batch)
        return self.collect(all_launched=batch is None)

    def _collect(self, launched: Launched) -> list[Sequence]:
        token_ids = launched.token_ids()
        self.counters.device_seconds += launched.device_seconds()
        now = time.monotonic()
        if launched.logprobs:
            for sequence, numbers in launched.logprobs.numbers():
                if sequence.phase is not Phase.FINISHED:
                    sequence.logprobs.append(numbers)
        if launched.prompt_logprobs:
            for sequence, numbers in launched.prompt_logprobs.numbers():
                sequence.prompt_logprobs.append(numbers)
                # Its own token may be finite even so.
                if math.isnan(numbers.logprob):
                    sequence.error = NOT_FINITE
        finished = []
        for sequence, token_id in zip(launched.batch.sampled, token_ids, strict=True):
            sequence.num_in_flight -= 1
            if sequence.phase is Phase.FINISHED:
                continue  # It was dropped, or its last token was in flight when this was launched.
            self.counters.output_tokens += 1
            if self._is_finished(sequence, token_id, now):
                finished += self._finish(sequence, now)
        return finished

    def _finish(self, sequence: Sequence, now: float) -> list[Sequence]:
        """Take a sequence out; returns the job's first one if all others are finished too. An error
        of one ends all."""
        self.scheduler.finish(sequence)
        first = sequence.first or sequence
        if sequence.error:
            first.error = sequence.error
            self.drop(first)
        if any(answer.phase is not Phase.FINISHED for answer in first.answers):
            return []
        first.finished = now
        if first.job.lora and not first.error:
            num_tokens = sum(len(answer.output_ids) for answer in first.answers)
            self.adapters.count(first.job.lora, output_tokens=num_tokens)
        return [first]

    def drop(self, sequence: Sequence) -> None:
        """Forget a job's sequences, wherever they stand."""
        for answer in sequence.answers:
            self.scheduler.finish(answer)

    def forget_prefixes(self) -> None:
        """Share nothing of what stands in the cache: a batch failed, and did not fill its pages."""
        self.scheduler.pool.forget()

    @property
    def kv_capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return self.scheduler.pool.num_pages * PAGE_SIZE

    @property
    def resident(self) -> list[str]:
        """Names of the adapters whose weights stand in a slot."""
        return self.adapters.names_of(self.slots.resident) if self.slots else []

    def _stop_search(self, job: Job) -> StopSearch | None:
        return self.tokenizer.stop_search(job.stop, job.min_tokens) if job.stop else None

    def _check_size(self, job: Job, num_prompt: int, max_new: int) -> None:
        capacity = self.kv_capacity
        if num_prompt + max_new > capacity:
            raise JobError(
                "kv_cache_too_small",
                f"prompt and answer may come to {num_prompt + max_new} tokens; the worker's KV"
                f" cache holds {capacity}. Lower max_tokens, or raise the worker's"
                " --max-total-tokens",
            )
        num_logprobs = 0
        if job.num_logprobs is not None:
            num_logprobs += job.n * max_new * (1 + job.num_logprobs)
        if job.prompt_logprobs is not None:
            num_logprobs += num_prompt * (1 + job.prompt_logprobs)
        if num_logprobs > MAX_LOGPROBS:
            raise JobError(
                "too_many_logprobs",
                f"the result may come to {num_logprobs} log probabilities; {MAX_LOGPROBS} are"
                " allowed. Lower top_logprobs, prompt_logprobs, max_tokens or n",
            )

    def _check_token_ids(self, job: Job) -> None:
        for name, ids in (("logit_bias", job.logit_bias), ("stop_token_ids", job.stop_token_ids)):
            if ids and max(ids) >= self._vocab_size:
                raise JobError(
                    "bad_sampling",
                    f"{name} holds token {max(ids)}; the model's vocabulary has"
                    f" {self._vocab_size} tokens",
                )

    def _is_finished(self, sequence: Sequence, token_id: int, now: float) -> bool:
        if token_id == NO_TOKEN:
            is_free = len(sequence.banned_token_ids) < self._vocab_size
            sequence.error = NOT_FINITE if is_free else ALL_BANNED
        if sequence.error:
            return True
        sequence.output_ids.append(token_id)
        sequence.first_token = sequence.first_token or now
        if token_id in sequence.end_token_ids:
            sequence.has_end_token = True
            sequence.finish_reason = "stop"
        elif sequence.stop_search:
            sequence.stop_text = sequence.stop_search.text_before_stop(token_id)
            sequence.finish_reason = "stop" if sequence.stop_text is not None else None
        if sequence.finish_reason is None and len(sequence.output_ids) >= sequence.max_new_tokens:
            sequence.finish_reason = "length"
        return sequence.finish_reason is not None

    def _count(self, batch: Batch) -> None:
        counters = self.counters
        counters.batches += 1
        counters.prompt_tokens += sum(item.num_rows for item in batch.scheduled if item.is_prefill)
        counters.max_adapters_in_batch = max(counters.max_adapters_in_batch, len(batch.adapters))


def _context_length(config: WorkerConfig, model: ModelConfig) -> int:
    wanted = config.context_length or model.max_position
    if wanted > model.max_position:
        raise BadInput(
            f"--context-length {wanted}: the model was made for at most {model.max_position}"
        )
    return wanted
