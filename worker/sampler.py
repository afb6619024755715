"""Chooses the next token of every sequence of a batch."""

from __future__ import annotations

import hashlib

import torch

from kernels.sample import sample
from schemas.job import Job
from worker.sequence import Sequence

#: In place of a token where the logits are not finite: there is none to choose.
NO_TOKEN = -1

_MASK = 2**64 - 1


def sample_batch(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """One token id a sequence. logits: [sequences, vocabulary] float32.

    Greedy sequences take the largest logit. The others draw with a number that depends on their
    seed and position alone, so neither neighbours nor a second run change what they get. A row
    whose logits are not finite gives NO_TOKEN.
    """
    largest, tokens = logits.max(dim=-1)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.job.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        jobs = [sequences[row].job for row in drawing]
        draws = [
            uniform(job_seed(sequences[row].job), len(sequences[row].output_ids)) for row in drawing
        ]

        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        tokens[rows] = sample(
            logits[rows],
            temperature=column([job.temperature for job in jobs], torch.float64),
            top_k=column([job.top_k for job in jobs], torch.int64),
            top_p=column([job.top_p for job in jobs], torch.float64),
            uniform=column(draws, torch.float64),
        )
    chosen: list[int] = tokens.where(largest.isfinite(), NO_TOKEN).tolist()
    return chosen


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
