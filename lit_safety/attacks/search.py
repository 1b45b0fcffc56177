"""Random and greedy search for token suffixes, for many prompts at a time. Scores are to be maximised.

Greedy: the gradient of the score with respect to the suffix's one-hot tokens says, to first order, what each exchange
of one token would bring (HotFlip, arXiv 1712.06751); single exchanges drawn from the best of them are then scored
(GCG, arXiv 2307.15043). The budget counts what was scored for a prompt; a gradient counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""Suffixes (P, K, L), numbers among V words -> scores (P, K): K candidates for each of P prompts."""
Gradient = Callable[[Tensor], Tensor]
"""Suffixes (P, L) -> derivative of each prompt's score with respect to its one-hot tokens (P, L, V)."""


class Best:
    """The best suffix of each prompt so far."""

    def __init__(self, prompts: int, length: int) -> None:
        self.suffixes = torch.zeros(prompts, length, dtype=torch.long)
        self.scores = torch.full((prompts,), -torch.inf)

    def offer(self, candidates: Tensor, scores: Tensor) -> None:
        """Take each prompt's best of K candidates (P, K, L) where it is better than what there was; of equal ones the
        first stays. A score that is not a number is never better."""
        scores = torch.where(scores.isnan(), -torch.inf, scores.detach().float().cpu())
        top, place = scores.max(dim=1)
        better = top > self.scores
        chosen = candidates[torch.arange(len(candidates)), place]
        self.suffixes = torch.where(better[:, None], chosen, self.suffixes)
        self.scores = torch.where(better, top, self.scores)


def random_search(
    score: Score, words: int, length: int, budgets: Sequence[int], batch: int, generators: Sequence[torch.Generator]
) -> Iterator[tuple[int, Best]]:
    """Independent uniform suffixes; yields (candidates tried, best) at each budget.

    Args:
        score: of candidates.
        words: V.
        length: L.
        budgets: rising numbers of candidates.
        batch: candidates scored at once.
        generators: one a prompt, so that no prompt's candidates depend on the others.
    """
    best, tried = Best(len(generators), length), 0
    for budget in budgets:
        while tried < budget:
            count = min(batch, budget - tried)
            candidates = torch.stack([torch.randint(words, (count, length), generator=g) for g in generators])
            best.offer(candidates, score(candidates))
            tried += count
        yield tried, best


def greedy_search(
    score: Score,
    gradient: Gradient,
    words: int,
    length: int,
    budgets: Sequence[int],
    batch: int,
    shortlist: int,
    generators: Sequence[torch.Generator],
) -> Iterator[tuple[int, Best]]:
    """Exchanges of one token that the gradient recommends; yields (candidates tried, best) at each budget.

    Args:
        score: of candidates.
        gradient: of the score.
        words: V.
        length: L.
        budgets: rising numbers of candidates; the first one tried is a random suffix.
        batch: exchanges scored after each gradient.
        shortlist: at each place, how many tokens of the highest derivative are drawn from.
        generators: one a prompt.
    """
    best, tried = Best(len(generators), length), 1
    start = torch.stack([torch.randint(words, (1, length), generator=g) for g in generators])
    best.offer(start, score(start))
    top = torch.empty(0)
    left = 0  # exchanges that may still be drawn from the gradient at hand
    for budget in budgets:
        while tried < budget:
            if left == 0:
                top = gradient(best.suffixes).topk(min(shortlist, words), dim=-1).indices.cpu()
                left = batch
                tried += 1
                continue
            count = min(left, budget - tried)
            candidates = torch.stack(
                [_exchanges(s, t, count, g) for s, t, g in zip(best.suffixes, top, generators, strict=True)]
            )
            best.offer(candidates, score(candidates))
            tried, left = tried + count, left - count
        yield tried, best


def _exchanges(suffix: Tensor, top: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` copies of a suffix (L,), in each of which one random place holds a random one of its shortlist (L, k)."""
    places = torch.randint(len(suffix), (count,), generator=generator)
    picks = torch.randint(top.shape[1], (count,), generator=generator)
    copies = suffix.repeat(count, 1)
    copies[torch.arange(count), places] = top[places, picks]
    return copies
