"""The searches on scores whose best suffix is known."""

from itertools import pairwise

import torch
from torch import Tensor

from lit_safety.attacks.suffix import Best, greedy_search, random_search

PLANTED = torch.tensor([[3, 1, 7], [0, 0, 9]])
WORDS = 50


def matches(candidates: Tensor) -> Tensor:
    """How many words are at the same place as in the planted suffix."""
    return (candidates == PLANTED[:, None]).float().sum(-1)


def slope(suffixes: Tensor) -> Tensor:
    """Its derivative: 1 at the planted words."""
    return torch.nn.functional.one_hot(PLANTED, WORDS).float()


def chances() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(2)]


def test_greedy_finds_the_planted_suffix() -> None:
    """With a shortlist of one, each exchange puts the right word in some place: 3 places are soon all met."""
    *_, (tried, best) = greedy_search(matches, slope, WORDS, 3, [40], 4, 1, chances())
    assert tried == 40
    assert torch.equal(best.suffixes, PLANTED)
    assert best.scores.tolist() == [3.0, 3.0]


def test_random_finds_a_single_planted_word() -> None:
    """1 of 8 words: 64 uniform draws miss it with a probability of (7/8)^64 = 0.0002."""
    planted = torch.tensor([[5], [2]])
    *_, (_, best) = random_search(lambda c: (c == planted[:, None]).float().sum(-1), 8, 1, [64], 16, chances())
    assert torch.equal(best.suffixes, planted)


def test_budgets_are_kept_to_the_candidate() -> None:
    """Candidates that were scored, and gradients as one each."""
    for search in ("random", "greedy"):
        scored = [0]

        def score(candidates: Tensor, scored: list[int] = scored) -> Tensor:
            scored[0] += candidates.shape[1]
            return matches(candidates)

        def gradient(suffixes: Tensor, scored: list[int] = scored) -> Tensor:
            scored[0] += 1
            return slope(suffixes)

        if search == "random":
            found = random_search(score, WORDS, 3, [1, 5, 23], 4, chances())
        else:
            found = greedy_search(score, gradient, WORDS, 3, [1, 5, 23], 4, 2, chances())
        spent = [(tried, scored[0]) for tried, _ in found]
        assert spent == [(1, 1), (5, 5), (23, 23)], search


def test_a_larger_budget_is_never_worse_and_no_prompt_depends_on_the_others() -> None:
    scores = [best.scores.clone() for _, best in random_search(matches, WORDS, 3, [4, 64, 512], 16, chances())]
    assert all((b >= a).all() for a, b in pairwise(scores))
    alone = random_search(lambda c: matches(c.repeat(2, 1, 1))[:1], WORDS, 3, [64], 16, chances()[:1])
    assert next(iter(alone))[1].scores[0] == scores[1][0]


def test_a_score_that_is_no_number_never_wins() -> None:
    best = Best(1, 1)
    best.offer(torch.tensor([[[4], [5]]]), torch.tensor([[float("nan"), -2.0]]))
    assert best.suffixes.tolist() == [[5]]
    best.offer(torch.tensor([[[6]]]), torch.tensor([[float("nan")]]))
    assert best.suffixes.tolist() == [[5]]
