import math

import pytest
import torch

from lit_safety.objectives import (
    DiffusionDPO,
    PairErrors,
    PairLabels,
    SafetyConstrainedDPO,
    cost_margin,
    dpo_loss,
    scdpo_loss,
)


def gradient(m: torch.Tensor, gamma: float, detach: bool) -> torch.Tensor:
    m = m.clone().requires_grad_(True)
    scdpo_loss(m, gamma, detach).sum().backward()
    assert m.grad is not None
    return m.grad


def test_golden():
    """m = 1, C_w = -1, C_l = 2, lambda = 0.5: m_SC = 1 + 0.5 * (-1 - 2) = -0.5.

    p = sigmoid(-0.5) = 0.3775407; -log p = 0.9740770; gamma 2: (1 - p)^2 = 0.6224593^2 = 0.3874556.
    Loss = 0.3874556 * 0.9740770 = 0.3774116.
    """
    m_sc = cost_margin(torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([2.0]), 0.5)
    assert m_sc.item() == pytest.approx(-0.5)
    assert scdpo_loss(m_sc, gamma=2.0).item() == pytest.approx(0.3774116, rel=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_without_margin_and_focus_it_is_dpo_to_the_bit(detach: bool):
    m = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 20
    costs = torch.randn(2, 4096, generator=torch.Generator().manual_seed(2))
    assert torch.equal(scdpo_loss(cost_margin(m, costs[0], costs[1], 0.0), 0.0, detach), dpo_loss(m))


@pytest.mark.parametrize("detach", [True, False])
def test_the_objective_without_margin_and_focus_is_dpo_to_the_bit(detach: bool):
    """Values, gradients and logs, with both regularisers on; the costs are unknown, and a clip must not read them."""
    generator = torch.Generator().manual_seed(3)
    values, clean = torch.rand(5, 500, generator=generator), (torch.rand(500, generator=generator) < 0.5).float()
    unknown = torch.full((500, 2), float("nan"))
    found = []
    for objective in (
        SafetyConstrainedDPO(40.0, 0.0, 0.0, detach, cost_clip=1.0, sft_weight=0.5, anchor_weight=2.0),
        DiffusionDPO(40.0, sft_weight=0.5, anchor_weight=2.0),
    ):
        leaves = values.clone().requires_grad_(True)
        output = objective(PairErrors(*leaves), PairLabels(clean, unknown, unknown, unknown))
        (gradient_,) = torch.autograd.grad(output.loss.sum(), leaves)
        found.append({"loss": output.loss, "gradient": gradient_, **output.logs})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, theirs[name]), name
    assert (ours["gradient"][[0, 1]] != 0).all()
    assert (ours["gradient"][4] != 0).equal(clean.bool())


def test_equal_costs_leave_the_margin_alone():
    m = torch.linspace(-3, 3, 7)
    assert torch.equal(cost_margin(m, torch.full((7,), 1.5), torch.full((7,), 1.5), 2.0), m)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("detach", [True, False])
def test_value_and_gradient_are_finite_far_out(gamma: float, detach: bool):
    m = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0])
    assert torch.isfinite(scdpo_loss(m, gamma, detach)).all()
    assert torch.isfinite(gradient(m, gamma, detach)).all()


def test_the_naive_power_would_not_be():
    """Why the weight is an exponential: at m = 20, 1 - sigmoid(m) is 0 in fp32 and 0^(0.5 - 1) is infinite."""
    m = torch.tensor([20.0], requires_grad=True)
    ((1 - torch.sigmoid(m)) ** 0.5 * -torch.nn.functional.logsigmoid(m)).sum().backward()
    assert m.grad is not None
    assert not torch.isfinite(m.grad).all()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_detached_gradient_is_a_power_of_what_is_missing(gamma: float):
    """|dL/dm| = (1 - p)^gamma * (1 - p): at m = 1, 1 - p = 0.2689414, so 0.2689414^(gamma + 1)."""
    expected = (1 / (1 + math.e)) ** (gamma + 1)
    assert -gradient(torch.tensor([1.0]), gamma, detach=True).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_grows_with_the_cost_difference_when_detached():
    m_sc = cost_margin(torch.zeros(5), torch.zeros(5), torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]), 1.0)
    for gamma in (0.0, 1.0, 2.0):
        size = -gradient(m_sc, gamma, detach=True)
        assert (size[1:] > size[:-1]).all()


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_attached_gradient_peaks_and_falls_again(gamma: float):
    m = torch.linspace(-12, 4, 1601)
    size = -gradient(m, gamma, detach=False)
    peak = m[size.argmax()].item()
    assert -4 < peak < -2
    assert size[0] < size.max() - 0.03  # towards 1, the gradient of plain DPO on a pair that is all wrong


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_attached_gradient_in_float64(gamma: float):
    m = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scdpo_loss(x, gamma, dfm_detach=False), (m,))


def test_costs_are_clipped_before_their_difference():
    """Costs -3 and 9 clipped at 2 are -2 and 2: m_SC = 0 - 4, loss = log(1 + e^4) = 4.0181499."""
    same = torch.ones(1)
    errors = PairErrors(same, same, same, same)
    labels = PairLabels(torch.zeros(1), torch.tensor([[0.0, 1.0]]), torch.tensor([[-3.0, 9.0]]), torch.zeros(1, 2))
    objective = SafetyConstrainedDPO(cost_weight=1.0, gamma=0.0, cost_clip=2.0)
    assert objective(errors, labels).loss.item() == pytest.approx(4.0181499, rel=1e-6)


def test_costs_are_needed_only_for_a_margin():
    assert SafetyConstrainedDPO(cost_weight=0.5).needs_cost
    assert not SafetyConstrainedDPO(cost_weight=0.0).needs_cost
