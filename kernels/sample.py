"""The choice of the next token from a row of logits."""

from __future__ import annotations

import torch


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    has_cuts: bool = True,
) -> torch.Tensor:
    """Draws from ``softmax(logits / temperature)`` cut down to the top k, then to the top p.

    Top k keeps the k largest logits, ties of the k-th included. Top p (nucleus sampling, Holtzman
    et al., 2019) keeps the fewest largest of the rest whose probabilities sum to at least p, ties
    of the last one included. The draw inverts the cumulative distribution in the order of the token
    ids, so a row's token depends on that row alone.

    logits: [rows, vocabulary] float32
    temperature: [rows] float64, above 0
    top_k: [rows] int64, 0 keeps all; top_p: [rows] float64
    uniform: [rows] float64 in [0, 1)
    has_cuts: False if no row has a top k or a top p; the sort of all logits is spared then
    Returns [rows] int64.
    """
    # Less than the largest, so that a temperature next to zero makes no infinity of it.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature[:, None]
    if has_cuts:
        scaled = _keep_top(scaled, top_k, top_p)
    cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    # The last sum may miss 1 by rounding. A draw below it lands on a token of positive probability.
    total = cumulative[:, -1]
    draw = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, draw[:, None], right=True).squeeze(1)


def _keep_top(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The logits with -inf for every token that top k or top p leaves out."""
    vocabulary = logits.shape[1]
    descending = logits.sort(dim=-1, descending=True).values
    kept = torch.where(top_k > 0, top_k, vocabulary).clamp_(max=vocabulary)
    threshold = descending.gather(1, kept[:, None] - 1)
    descending = descending.masked_fill(descending < threshold, float("-inf"))

    probabilities = torch.softmax(descending, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The sum may reach 1 by rounding before the last token; a top p of 1 keeps them all.
    in_nucleus = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    in_nucleus[:, 0] = True
    smallest = descending.masked_fill(~in_nucleus, float("inf")).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < torch.maximum(smallest, threshold), float("-inf"))
