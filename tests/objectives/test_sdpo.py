import pytest
import torch

from lit_safety.objectives import (
    DiffusionDPO,
    DiffusionSDPO,
    PairErrors,
    PairLabels,
    loser_scale,
    residual_overlap,
    scale_gradient,
)

PAIRS, SHAPE = 256, (4, 3, 3)


def labels(count: int = PAIRS) -> PairLabels:
    return PairLabels(torch.zeros(count), *(torch.zeros(count, 2) for _ in range(3)))


def residuals(alike: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves (PAIRS, *SHAPE) of a chosen and a rejected residual of many sizes, alike or opposed."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    chosen = draw(PAIRS, *SHAPE) * draw(PAIRS, 1, 1, 1).exp()
    rejected = (alike * chosen + draw(PAIRS, *SHAPE)) * draw(PAIRS, 1, 1, 1).exp()
    return chosen.requires_grad_(True), rejected.requires_grad_(True)


def pair_errors(chosen: torch.Tensor, rejected: torch.Tensor) -> PairErrors:
    e_w, e_l = (x.square().flatten(1).mean(1) for x in (chosen, rejected))
    reference = torch.ones(len(e_w), dtype=e_w.dtype)
    both = torch.cat([chosen, rejected])
    return PairErrors(e_w, e_l, reference, reference, overlap=residual_overlap(both, torch.zeros_like(both)).double())


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)


def test_overlap_golden():
    """Pair 1: residuals (1, 2) and (3, -1): (3 - 2) / 2 = 0.5. Pair 2: (0, 4) and (5, 1): 4 / 2 = 2."""
    prediction = torch.tensor([[2.0, 2.0], [0.0, 4.0], [4.0, -1.0], [5.0, 1.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    overlap = residual_overlap(prediction, target)
    assert overlap.tolist() == [0.5, 2.0]
    assert not overlap.requires_grad


def test_scale_golden():
    """mu 0.25, e_w 2: overlap 3 gives 0.75 * 2 / 3 = 0.5; overlap 1 gives 1.5, so 1; overlap 0 and below give 1."""
    overlap = torch.tensor([3.0, 1.0, 0.0, -3.0])
    assert loser_scale(torch.full((4,), 2.0), overlap, 0.25).tolist() == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("alike", [-2.0, 0.0, 2.0])
def test_the_winner_keeps_its_share_in_output_space(mu: float, alike: float):
    """The gradient of the loss itself, not of a formula: with G_w and G_l its parts, g_w . (G_w + G_l) >= mu g_w . G_w.

    G_w is a positive multiple of g_w, the gradient of the winner's own error, and G_l of -kappa g_l by the same factor.
    """
    chosen, rejected = residuals(alike)
    errors = pair_errors(chosen, rejected)
    (own,) = torch.autograd.grad(errors.policy_chosen.sum(), chosen, retain_graph=True)
    loss = DiffusionSDPO(beta=0.02, mu=mu)(errors, labels()).loss.sum()
    step_chosen, step_rejected = torch.autograd.grad(loss, (chosen, rejected))
    share = dot(own, step_chosen)
    left = dot(own, step_chosen + step_rejected)
    assert (share > 0).all()
    assert (left >= mu * share - 1e-6 * share).all()
    if alike > 0:  # the bound is reached and not undercut: no more of the loser is given away than must be
        scaled = loser_scale(errors.policy_chosen, errors.overlap, mu) < 1
        assert scaled.any()
        torch.testing.assert_close(left[scaled], mu * share[scaled], rtol=1e-4, atol=1e-6 * share.max().item())


def test_dpo_does_not_keep_it():
    """What the scale is for: with residuals alike, plain DPO moves some winners' predictions away from the target."""
    chosen, rejected = residuals(2.0)
    errors = pair_errors(chosen, rejected)
    (own,) = torch.autograd.grad(errors.policy_chosen.sum(), chosen, retain_graph=True)
    loss = DiffusionDPO(beta=0.02)(errors, labels()).loss.sum()
    step_chosen, step_rejected = torch.autograd.grad(loss, (chosen, rejected))
    assert (dot(own, step_chosen + step_rejected) < 0).sum() > PAIRS / 4


def test_value_and_chosen_gradient_are_those_of_dpo_and_the_loser_is_scaled():
    """e_w 2, overlap 3, mu 0.25: kappa 0.5, so half of DPO's gradient on the rejected error."""
    gradients = []
    for objective in (DiffusionSDPO(beta=2.0, mu=0.25), DiffusionDPO(beta=2.0)):
        e_w, e_l = torch.tensor([2.0], requires_grad=True), torch.tensor([7.0], requires_grad=True)
        errors = PairErrors(e_w, e_l, torch.tensor([2.5]), torch.tensor([6.0]), overlap=torch.tensor([3.0]))
        output = objective(errors, labels(1))
        output.loss.sum().backward()
        gradients.append((output.loss.item(), e_w.grad.item(), e_l.grad.item()))
    (loss, chosen, rejected), (dpo, dpo_chosen, dpo_rejected) = gradients
    assert (loss, chosen, rejected) == (dpo, dpo_chosen, 0.5 * dpo_rejected)


def test_opposed_residuals_are_dpo_to_the_bit():
    gradients = []
    for objective in (DiffusionSDPO(beta=0.02), DiffusionDPO(beta=0.02)):
        chosen, rejected = residuals(-50.0)
        errors = pair_errors(chosen, rejected)
        assert (errors.overlap < 0).all()
        gradients.append(torch.autograd.grad(objective(errors, labels()).loss.sum(), (chosen, rejected)))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_a_scaled_gradient_leaves_the_value_alone():
    x = torch.randn(64, generator=torch.Generator().manual_seed(4)) * 1e3
    assert torch.equal(scale_gradient(x, torch.rand(64)), x)


def test_what_it_needs_and_refuses():
    assert DiffusionSDPO.needs_overlap
    assert not DiffusionDPO.needs_overlap
    same = torch.ones(1)
    with pytest.raises(ValueError, match="overlap"):
        DiffusionSDPO()(PairErrors(same, same, same, same), labels(1))
    with pytest.raises(ValueError, match="mu must lie"):
        DiffusionSDPO(mu=1.1)
