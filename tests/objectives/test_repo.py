import pytest
import torch

from lit_safety.objectives import DiffusionDPO, PairErrors, PairLabels, RePO, repo_penalty


def errors(count: int = 64, seed: int = 0) -> PairErrors:
    generator = torch.Generator().manual_seed(seed)
    return PairErrors(*(torch.rand(count, generator=generator).requires_grad_(i < 2) for i in range(4)))


def labels(chosen: float, rejected: float, count: int = 64) -> PairLabels:
    empty = torch.zeros(count, 2)
    return PairLabels(torch.zeros(count), empty, torch.tensor([[chosen, rejected]] * count), empty)


def test_penalty_golden():
    """Costs -1 and 2, rewards 3 and 0: 0 * softplus(3) + 2 * log 2 = 1.3862944."""
    penalty = repo_penalty(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([[-1.0, 2.0]]))
    assert penalty.item() == pytest.approx(1.3862944, rel=1e-6)


def test_loss_golden():
    """e 0.10 0.20, r 0.12 0.19, beta 200: rewards 2 and -1, m 3, -log sigmoid(3) = 0.0485873.

    Costs 0.5 and 2: 0.5 * softplus(2) + 2 * softplus(-1) = 0.5 * 2.1269280 + 2 * 0.3132617 = 1.6899874.
    With weight 0.1: 0.0485873 + 0.1689987 = 0.2175861.
    """
    pair = PairErrors(*(torch.tensor([x], dtype=torch.float64) for x in (0.10, 0.20, 0.12, 0.19)))
    output = RePO(beta=200.0, penalty_weight=0.1)(pair, labels(0.5, 2.0, count=1))
    assert output.loss.item() == pytest.approx(0.2175861, rel=1e-6)
    assert output.logs["loss/penalty"].item() == pytest.approx(1.6899874, rel=1e-6)


@pytest.mark.parametrize(("weight", "costs"), [(1.0, (-1.0, -0.5)), (1.0, (0.0, 0.0)), (0.0, (2.0, 3.0))])
def test_without_harmful_images_it_is_dpo_to_the_bit(weight: float, costs: tuple[float, float]):
    """The gradients of a safe image are 0 too."""
    ours, theirs = errors(), errors()
    repo = RePO(penalty_weight=weight)(ours, labels(*costs)).loss
    dpo = DiffusionDPO()(theirs, labels(*costs)).loss
    assert torch.equal(repo, dpo)
    repo.sum().backward()
    dpo.sum().backward()
    assert torch.equal(ours.policy_chosen.grad, theirs.policy_chosen.grad)
    assert torch.equal(ours.policy_rejected.grad, theirs.policy_rejected.grad)


def test_a_harmful_chosen_image_is_pushed_away_when_the_penalty_outweighs_the_preference():
    """At the start -log sigmoid(m) pulls with beta / 4 and the penalty pushes with weight * C * beta / 4."""
    for weight, sign in ((0.5, 1.0), (1.0, 0.0), (2.0, -1.0)):
        pair = PairErrors(torch.ones(1, requires_grad=True), torch.ones(1), torch.ones(1), torch.ones(1))
        RePO(beta=200.0, penalty_weight=weight)(pair, labels(1.0, -1.0, count=1)).loss.sum().backward()
        assert torch.equal(pair.policy_chosen.grad.sign(), torch.tensor([sign]))


def test_an_unknown_cost_is_not_read_as_harmless():
    assert torch.isnan(repo_penalty(torch.zeros(1), torch.zeros(1), torch.tensor([[-1.0, float("nan")]]))).all()
    assert RePO().needs_cost
    assert not RePO(penalty_weight=0.0).needs_cost
