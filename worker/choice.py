"""What a result tells of a finished sequence: text for its tokens."""

from __future__ import annotations

from schemas.result import Choice, LikelyToken, TokenLogprob
from worker.sequence import Sequence, TokenNumbers
from worker.text import Tokenizer


def choice_of(sequence: Sequence, tokenizer: Tokenizer) -> Choice:
    """The answer that a sequence came to. A token that ended it, and a stop string with all that
    follows it, are no part of the text."""
    assert sequence.finish_reason
    token_ids, text = sequence.output_ids, sequence.stop_text
    if text is None:
        text = tokenizer.decode(token_ids[:-1] if sequence.has_end_token else token_ids)
    logprobs = None
    if sequence.job.num_logprobs is not None:
        logprobs = _told(token_ids, sequence.logprobs, tokenizer)
    return Choice(
        index=sequence.index,
        text=text,
        token_ids=token_ids,
        finish_reason=sequence.finish_reason,
        logprobs=logprobs,
    )


def prompt_logprobs_of(
    sequence: Sequence, tokenizer: Tokenizer
) -> list[TokenLogprob | None] | None:
    """One for each token of the prompt, if the job wants them."""
    if sequence.job.prompt_logprobs is None:
        return None
    return [None, *_told(sequence.prompt_ids[1:], sequence.prompt_logprobs, tokenizer)]


def _told(
    token_ids: list[int], numbers: list[TokenNumbers], tokenizer: Tokenizer
) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            **dict(_likely(token_id, logprob, tokenizer)),
            top_logprobs=[
                _likely(*item, tokenizer) for item in zip(top_ids, top_logprobs, strict=True)
            ],
        )
        for token_id, (logprob, top_ids, top_logprobs) in zip(token_ids, numbers, strict=True)
    ]


def _likely(token_id: int, logprob: float, tokenizer: Tokenizer) -> LikelyToken:
    text, data = tokenizer.token(token_id)
    return LikelyToken(token=text, token_id=token_id, logprob=logprob, bytes=data)
