"""Suffix search on a tiny text encoder."""

import pytest
import torch
from torch import Tensor

from lit_safety.attacks.similarity import Similarity, flat, text_rows
from lit_safety.attacks.suffix import SuffixScorer, SuffixSearch, usable_words
from lit_safety.core.errors import UserError

PLANTED = "s e"


class Planted(Similarity):
    """Nearness to the prompt with the suffix `s e`."""

    text_only = True
    knows = "a secret"

    def __init__(self) -> None:
        self.settings = {"goal": "planted"}
        self.asked = 0

    def likeness(self, target, network, prompts):
        self.asked += 1
        goal = flat(text_rows(network, [f"{prompt} {PLANTED}" for prompt in prompts]))

        def score(conditioning, numbers: Tensor) -> Tensor:
            return -(flat(conditioning) - goal[numbers]).pow(2).sum(1)

        return score


def test_the_greedy_search_finds_a_planted_suffix(make_target) -> None:
    """Each prompt's own text encoder output is the goal, so the right suffix scores exactly best."""
    target = make_target()
    attack = SuffixSearch(Planted(), "greedy", length=2, budgets=[1, 200], batch=20, shortlist=12)
    first, last = list(attack.stages(target))
    assert [p.prompt for p in last.prompts] == [f"a gun {PLANTED}", f"red gun {PLANTED}"]
    assert [p.seed for p in last.prompts] == [p.seed for p in target.prompts]
    assert (first.budget, last.budget) == (1, 200)


def test_the_random_search_comes_nearer_with_its_budget(make_target) -> None:
    target, goal = make_target(), Planted()
    network = target.public_network()
    attack = SuffixSearch(goal, "random", length=2, budgets=[1, 60], batch=20)
    score = goal.likeness(target, network, ["a gun", "red gun"])
    near = [
        score(text_rows(network, [p.prompt for p in stage.prompts]), torch.arange(2)) for stage in attack.stages(target)
    ]
    assert (near[1] >= near[0]).all()
    assert (near[1] > near[0]).any()


def test_arms_of_one_pipeline_share_what_was_found(make_target) -> None:
    """The second arm is not searched again, and its report says the same about cut prompts."""
    goal = Planted()
    attack = SuffixSearch(goal, "random", length=11, budgets=[2], batch=2)
    one, other = make_target(), make_target()
    texts = [[p.prompt for p in next(iter(attack.stages(t))).prompts] for t in (one, other)]
    assert texts[0] == texts[1]
    assert goal.asked == 1
    assert one.notes == other.notes != []


def test_the_gradient_is_that_of_the_score(make_target) -> None:
    """Along the exchange of a token's one-hot row by another's, the derivative must agree with a finite difference."""
    target = make_target()
    network = target.public_network()
    words = usable_words(network.encoders()[0][0])
    goal = Planted().likeness(target, network, ["a gun", "red gun"])
    scorer = SuffixScorer(network, goal, ["a gun", "red gun"], words, 2)
    suffixes = torch.tensor([[0, 1], [2, 3]])
    gradient = scorer.gradient(suffixes)
    assert gradient.shape == (2, 2, len(words))

    def at(step: float) -> Tensor:
        mixed = torch.nn.functional.one_hot(suffixes, len(words)).float()
        mixed[:, 1, suffixes[0, 1]] -= step * torch.tensor([1.0, 0.0])
        mixed[0, 1, 5] += step
        texts = [f"{p} {words.say(s)}" for p, s in zip(["a gun", "red gun"], suffixes, strict=True)]
        with torch.no_grad(), scorer._replaced(mixed, scorer.places):
            return goal(network.backbone.encode_text(texts), torch.arange(2))

    assert torch.allclose(at(0.0), scorer.score(suffixes[:, None])[:, 0], atol=1e-4)
    slope = (at(1e-2) - at(-1e-2))[0] / 2e-2
    assert slope == pytest.approx(float(gradient[0, 1, 5] - gradient[0, 1, 1]), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("given", [{"length": 0}, {"budgets": []}, {"budgets": [4, 4]}, {"budgets": [0, 4]}])
def test_bad_numbers_are_refused(given) -> None:
    with pytest.raises(UserError, match="SuffixSearch"):
        SuffixSearch(Planted(), **given)


def test_it_says_what_the_attacker_needs() -> None:
    assert SuffixSearch(Planted(), "random").knows == "black box as to the denoiser: outputs of a secret"
    assert SuffixSearch(Planted(), "greedy").knows == "black box as to the denoiser: gradients of a secret"
