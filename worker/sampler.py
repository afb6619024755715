"""Chooses the next token of every sequence of a batch."""

from __future__ import annotations

import hashlib

import torch

from kernels.sample import sample
from schemas.job import Job
from worker.sequence import Sequence
from worker.staging import send

#: In place of a token where the logits are not finite: there is none to choose.
NO_TOKEN = -1

_MASK = 2**64 - 1


def choose_largest(logits: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit of each row; NO_TOKEN for a row that is not finite.

    logits: [rows, vocabulary]; returns [rows] int32.
    """
    # NaN counts as the largest.
    largest, tokens = logits.max(dim=-1)
    return tokens.where(largest.isfinite(), NO_TOKEN).int()


def draw(tokens: torch.Tensor, logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Replaces the tokens of sequences that want to be drawn for.

    A draw is made with a number that depends on the job's seed and the token's position alone, so
    neither neighbours nor a second run change what a job gets. NO_TOKEN stays.

    tokens: [sequences] int32, what ``choose_largest`` made of the logits [sequences, vocabulary]
    """
    drawing = [row for row, sequence in enumerate(sequences) if sequence.job.temperature > 0]
    if not drawing:
        return
    jobs = [sequences[row].job for row in drawing]
    draws = [uniform(job_seed(s.job), s.num_generated) for s in (sequences[r] for r in drawing)]
    rows = send(drawing, torch.int64, logits.device)
    drawn = sample(
        logits[rows].float(),
        temperature=send([job.temperature for job in jobs], torch.float64, logits.device),
        top_k=send([job.top_k for job in jobs], torch.int64, logits.device),
        top_p=send([job.top_p for job in jobs], torch.float64, logits.device),
        uniform=send(draws, torch.float64, logits.device),
        has_cuts=any(job.top_k > 0 or job.top_p < 1 for job in jobs),
    )
    tokens[rows] = drawn.int().where(tokens[rows] != NO_TOKEN, NO_TOKEN)


def job_seed(job: Job) -> int:
    """The job's seed, or one made from its id: a second attempt draws the same tokens."""
    if job.seed is not None:
        return job.seed
    return int.from_bytes(hashlib.sha256(job.id.encode()).digest()[:8], "big")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from SplitMix64 (Steele, Lea and Flood, 2014), by seed and position."""
    z = _mix(_mix(seed) + position * 0x9E3779B97F4A7C15)
    return (z >> 11) / 2**53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
