"""Between text and token ids: prompts in, answers out."""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from schemas.errors import BadInput, JobError
from schemas.job import Job
from worker.stop_strings import NO_CHARACTER, StopSearch
from worker.token_bytes import token_bytes

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """The model's tokenizer and chat template, or their absence."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """A folder without a tokenizer serves jobs that bring token ids."""
        self._vocab_size = vocab_size
        self.token = lru_cache(maxsize=65536)(self._token)
        # The Rust tokenizer refuses to be used while another thread sets its truncation.
        self._lock = threading.Lock()
        self._tokenizer: PreTrainedTokenizerFast | None = None
        if any((folder / file).exists() for file in _TOKENIZER_FILES):
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # The Rust tokenizer's are of no class of their own.
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BadInput(
                    f"--model-path {folder}: cannot read its tokenizer: {reason}"
                ) from error

    def encode(self, job: Job) -> list[int]:
        """The prompt's token ids; raises JobError if the job has none that the model can read."""
        ids = self._ids_of(job)
        # A tokenizer may know tokens that were added to it and never to the model.
        if max(ids) >= self._vocab_size:
            raise JobError(
                "bad_prompt",
                f"the prompt holds token {max(ids)}; the model's vocabulary has"
                f" {self._vocab_size} tokens",
            )
        return ids

    def decode(self, token_ids: list[int]) -> str | None:
        """The text of an answer, without special tokens; None without a tokenizer."""
        return None if self._tokenizer is None else self._decode(self._tokenizer, token_ids)

    def stop_search(self, stops: list[str], min_tokens: int = 0) -> StopSearch:
        """A search for stop strings in one answer, behind its first ``min_tokens``; raises JobError
        without a tokenizer."""
        decode = partial(self._decode, self._present("leave out stop"))
        return StopSearch(stops, decode, min_tokens)

    def spellings(self, words: list[str]) -> list[list[int]]:
        """The tokens of words as they begin a text, and as they follow a space; raises JobError
        without a tokenizer."""
        tokenizer = self._present("leave out bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip() or word
            for text in (bare, f" {bare}"):
                with self._lock:
                    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                if ids and max(ids) < self._vocab_size:  # Others the model cannot write.
                    found[tuple(ids)] = None
        return [list(ids) for ids in found]

    def _token(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes, special tokens as they are written; an empty text and None
        without a tokenizer.

        The bytes of an answer's tokens are together those of its text, special tokens and a space
        that some tokenizers strip from the beginning left aside.
        """
        if self._tokenizer is None:
            return "", None
        # Twice, for a decoder strips the space that begins a text.
        once, twice = (self._written(self._tokenizer, [token_id] * n) for n in (1, 2))
        text = twice[len(once) :]
        if NO_CHARACTER not in twice:
            return text, list(text.encode())
        data = token_bytes(self._tokenizer.convert_ids_to_tokens(token_id))
        return data.decode(errors="replace"), list(data)

    def _present(self, remedy: str) -> PreTrainedTokenizerFast:
        if self._tokenizer is None:
            raise JobError(
                "no_tokenizer", f"the worker's model folder holds no tokenizer; {remedy}"
            )
        return self._tokenizer

    def _ids_of(self, job: Job) -> list[int]:
        if job.prompt_token_ids is not None:
            return job.prompt_token_ids
        tokenizer = self._present("send prompt_token_ids")
        if job.messages is not None:
            return self._chat(tokenizer, job)
        with self._lock:
            ids: list[int] = tokenizer(job.prompt)["input_ids"]
        if not ids:
            raise JobError("bad_prompt", "the prompt is empty")
        return ids

    def _decode(self, tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
        with self._lock:
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _written(self, tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
        with self._lock:
            text = tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        assert isinstance(text, str)
        return text

    def _chat(self, tokenizer: PreTrainedTokenizerFast, job: Job) -> list[int]:
        if not tokenizer.chat_template:
            raise JobError(
                "no_chat_template",
                "the model has no chat template; send prompt instead of messages",
            )
        messages = [message.model_dump() for message in job.messages or ()]
        try:
            with self._lock:
                encoded = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True
                )
        except Exception as error:  # The template is the model's code, and may fail in any way.
            raise JobError(
                "bad_prompt", f"the model's chat template refuses the messages: {error}"
            ) from error
        ids: list[int] = encoded["input_ids"]
        if not ids:
            raise JobError("bad_prompt", "the model's chat template makes nothing of the messages")
        return ids
