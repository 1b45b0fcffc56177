import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.cost_model.metrics import fit_calibration, smoothed_targets


def drawn(count: int = 4000) -> tuple[Tensor, Tensor]:
    """Costs z, and labels with P(harmful) = sigmoid((z - 1) / 4): z lacks a temperature of 4 and a bias of -1."""
    generator = torch.Generator().manual_seed(0)
    costs = 6 * torch.randn(count, generator=generator)
    harmful = (torch.rand(count, generator=generator) < ((costs - 1) / 4).sigmoid()).float()
    return costs, harmful


def test_it_finds_temperature_and_bias_and_lowers_the_likelihood_loss():
    costs, harmful = drawn()
    temperature, bias = fit_calibration(costs, harmful)
    assert temperature == pytest.approx(4.0, rel=0.1)
    assert bias == pytest.approx(-1.0, abs=0.3)
    before = F.binary_cross_entropy_with_logits(costs, harmful)
    after = F.binary_cross_entropy_with_logits((costs + bias) / temperature, harmful)
    assert after < 0.8 * before


def test_any_scale_gives_the_same_calibrated_costs():
    costs, harmful = drawn(500)
    found = []
    for scale in (1e-3, 1.0, 1e3):
        temperature, bias = fit_calibration(scale * costs, harmful)
        found.append((scale * costs + bias) / temperature)
    assert torch.allclose(found[0], found[1], atol=1e-2)
    assert torch.allclose(found[2], found[1], atol=1e-2)


def test_perfectly_separated_costs_get_no_infinite_certainty():
    """Platt's targets for 3 harmful and 1 safe: 4/5 and 1/3. Two points, two numbers: met exactly."""
    costs, harmful = torch.tensor([2.0, 2.0, 2.0, -2.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert smoothed_targets(harmful).tolist() == pytest.approx([0.8, 0.8, 0.8, 1 / 3])
    temperature, bias = fit_calibration(costs, harmful)
    assert ((costs + bias) / temperature).sigmoid().tolist() == pytest.approx([0.8, 0.8, 0.8, 1 / 3], abs=1e-3)


def test_unknown_labels_are_left_out():
    costs, harmful = drawn(200)
    more = torch.cat([costs, torch.full((100,), 50.0)]), torch.cat([harmful, torch.full((100,), float("nan"))])
    assert fit_calibration(*more) == pytest.approx(fit_calibration(costs, harmful))


@pytest.mark.parametrize(
    ("costs", "labels"),
    [([], []), ([1.0, 2.0], [1.0, 1.0]), ([3.0, 3.0], [0.0, 1.0]), ([1.0], [float("nan")])],
)
def test_what_cannot_be_calibrated_is_left_as_it_is(costs: list[float], labels: list[float]):
    assert fit_calibration(torch.tensor(costs), torch.tensor(labels)) == (1.0, 0.0)


def test_the_order_never_turns_round():
    """Costs that are worse than chance still get a positive temperature: calibration may not hide that."""
    costs, harmful = drawn(500)
    temperature, _ = fit_calibration(-costs, harmful)
    assert temperature > 0
