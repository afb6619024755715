"""Chooses the next token of every sequence of a batch."""

from __future__ import annotations

import torch

from kernels.sample import Draw, sample
from worker.sequence import Sequence
from worker.staging import send

_MASK = 2**64 - 1


def draw(tokens: torch.Tensor, logits: torch.Tensor, sequences: list[Sequence]) -> bool:
    """Replaces the tokens of sequences that want to be drawn for; False if there are none.

    A draw is made with a number that depends on the job's seed and the token's position alone, so
    neither neighbours nor a second run change what a job gets. NO_TOKEN stays.

    tokens: [sequences] int32, what ``largest_token`` made of the logits [sequences, vocabulary]
    """
    draws = [
        Draw(
            row,
            sequence.job.temperature,
            sequence.job.top_k,
            sequence.job.top_p,
            uniform(sequence.seed, sequence.num_generated),
        )
        for row, sequence in enumerate(sequences)
        if sequence.job.temperature > 0
    ]
    if draws:
        sample(tokens, logits, send(draws, torch.float64, logits.device))
    return bool(draws)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from SplitMix64 (Steele, Lea and Flood, 2014), by seed and position."""
    z = _mix(_mix(seed) + position * 0x9E3779B97F4A7C15)
    return (z >> 11) / 2**53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
