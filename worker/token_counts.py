"""How often tokens stand in prompts and answers, where the device can read it."""

from __future__ import annotations

import torch

from worker.sequence import Sequence
from worker.staging import send


class TokenCounts:
    """Counts for the sequences that are penalized, by their lines of the page table.

    They are kept on the device, since a batch is launched before the tokens of the last one are
    known. There is room for lines up to the highest that asked for it; before that, for none. A
    line takes 5 bytes a token of the vocabulary: 641 KB for 128,256 tokens.
    """

    def __init__(self, *, max_lines: int, vocab_size: int, device: torch.device) -> None:
        self._max_lines = max_lines
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._in_answer = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._counted: dict[int, tuple[Sequence, int]] = {}
        """By line whose tokens are counted there, and how many of its answer."""

    @property
    def num_lines(self) -> int:
        """Lines that there is room for."""
        return len(self._in_answer)

    def penalize(
        self, logits: torch.Tensor, rows: list[tuple[int, Sequence, float, float, float]]
    ) -> None:
        """Makes tokens less likely that are there already (vLLM's apply_penalties).

        The repetition penalty (Keskar et al., 2019, CTRL) divides positive logits of tokens of
        prompt and answer, and multiplies negative ones. Then the frequency penalty is subtracted as
        often as a token stands in the answer, and the presence penalty once if it does, as OpenAI
        defines them.

        logits: [rows, vocabulary] float32, changed in place
        rows: (row, its sequence, repetition, frequency and presence penalty) each
        """
        for _, sequence, *_ in rows:
            self._count(sequence)
        numbers = [(row, sequence.line, *penalties) for row, sequence, *penalties in rows]
        row, line, *on_device = send(numbers, torch.float64, logits.device).unbind(dim=1)
        repetition, frequency, presence = (part.float()[:, None] for part in on_device)
        row, line = row.long(), line.long()
        counts, penalized = self._in_answer[line], logits[row]
        is_in_answer = counts > 0
        weakened = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
        penalized = weakened.where(self._in_prompt[line] | is_in_answer, penalized)
        penalized -= frequency * counts
        penalized -= presence * is_in_answer
        logits[row] = penalized

    def add(self, rows: list[tuple[int, Sequence]], tokens: torch.Tensor) -> None:
        """Count the tokens that sequences get now, each from its row of ``tokens``, int32."""
        if not rows:
            return
        numbers = [(row, sequence.line) for row, sequence in rows]
        row, line = send(numbers, torch.int64, tokens.device).unbind(dim=1)
        # NO_TOKEN, of a sequence that is about to be dropped, would be out of bounds.
        self._in_answer[line, tokens[row].long().clamp(0)] += 1
        for _, sequence in rows:
            self._counted[sequence.line] = sequence, sequence.num_generated + 1

    def _count(self, sequence: Sequence) -> None:
        """Count anew what stands on a line, unless it is done: when a sequence begins, and when it
        goes on after it was preempted. All its tokens are known then."""
        line, device = sequence.line, self._in_answer.device
        if self._counted.get(line) == (sequence, sequence.num_generated):
            return
        self._reserve(line + 1)
        self._in_prompt[line] = False
        self._in_prompt[line, send(sequence.prompt_ids, torch.int64, device)] = True
        self._in_answer[line] = 0
        if sequence.output_ids:
            answer = send(sequence.output_ids, torch.int64, device)
            once = torch.ones_like(answer, dtype=torch.int32)
            self._in_answer[line].scatter_add_(0, answer, once)

    def _reserve(self, num_lines: int) -> None:
        """Lines are given out from the lowest on, so that few jobs take little memory."""
        missing = num_lines - self.num_lines
        if missing > 0:
            missing = min(max(missing, self.num_lines), self._max_lines - self.num_lines)
            self._in_prompt = _longer(self._in_prompt, missing)
            self._in_answer = _longer(self._in_answer, missing)


def _longer(rows: torch.Tensor, number: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(number, rows.shape[1])])
