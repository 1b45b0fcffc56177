"""What holds for every objective: finite far out, gradients that are the loss's, the right direction at the start."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch

import lit_safety.objectives
from lit_safety.objectives import (
    BFPO,
    DMPO,
    DSPO,
    GDRO,
    IPO,
    NCD,
    ConstrainedDPO,
    DiffusionDPO,
    DiffusionNFT,
    DiffusionSDPO,
    FocalInverse,
    GroupDPO,
    Hinge,
    LinearDPO,
    Objective,
    PairErrors,
    PairLabels,
    RePO,
    SafetyConstrainedDPO,
)

#: Whose gradient is the derivative of the loss: no part of it is detached on purpose.
SMOOTH: list[Objective] = [
    DiffusionDPO(2.0, label_smoothing=0.1, sft_weight=1.0),
    IPO(2.0),
    Hinge(2.0),
    LinearDPO(2.0),
    BFPO(2.0),
    RePO(2.0, penalty_weight=0.5),
    ConstrainedDPO(2.0, label_smoothing=0.1),
    SafetyConstrainedDPO(2.0, gamma=0.5, dfm_detach=False),
    FocalInverse(2.0, gamma=0.5, detach_focus=False),
    FocalInverse(2.0, gamma=1.4, detach_focus=False),
    DMPO(2.0, alpha=0.1),
    DSPO(1.0),
    GDRO(2.0),
    GroupDPO(2.0, label_smoothing=0.1),
    NCD(2.0),
]
DETACHED: list[Objective] = [
    DiffusionSDPO(2.0),
    SafetyConstrainedDPO(2.0, gamma=0.5),
    FocalInverse(2.0, gamma=0.5),
    FocalInverse(2.0, gamma=5.0),
]


def name(objective: Objective) -> str:
    detach = getattr(objective, "dfm_detach", getattr(objective, "detach_focus", None))
    settings = {"gamma": getattr(objective, "gamma", None), "detach": detach}
    return "-".join([type(objective).__name__, *(f"{k}{v}" for k, v in settings.items() if v is not None)])


def labels(size: int, dtype: torch.dtype = torch.float32) -> PairLabels:
    """The chosen image is safe and the better one, the rejected one is harmful."""
    columns = [torch.tensor([pair] * size, dtype=dtype) for pair in ((0.0, 1.0), (-1.0, 1.0), (0.8, 0.2))]
    return PairLabels(torch.zeros(size, dtype=dtype), *columns)


def batch(margins: torch.Tensor, beta: float = 2.0) -> tuple[PairErrors, torch.Tensor, torch.Tensor]:
    """Errors that give these margins, half of each on either image: m = -(beta / 2)((e_w - 300) - (e_l - 300))."""
    chosen = (300 - margins / beta).requires_grad_(True)
    rejected = (300 + margins / beta).requires_grad_(True)
    reference = torch.full_like(margins, 300.0)
    more = {"overlap": torch.full_like(margins, 350.0), "drift": torch.zeros_like(margins)}
    return PairErrors(chosen, rejected, reference, reference, **more), chosen, rejected


@pytest.mark.parametrize("objective", SMOOTH + DETACHED, ids=name)
def test_value_and_gradient_are_finite_far_out(objective: Objective):
    margins = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0])
    errors, chosen, rejected = batch(margins, objective.beta)
    output = objective(errors, labels(5))
    assert torch.equal(output.logs["rewards/margins"], margins)
    output.loss.sum().backward()
    assert torch.isfinite(output.loss).all()
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize("objective", SMOOTH, ids=name)
def test_gradient_in_float64(objective: Objective):
    """Margins on both sides of every corner (hinge at 1) and none on one."""
    errors, chosen, rejected = batch(torch.tensor([-4.3, -1.2, 0.0, 0.3, 0.7, 1.4, 5.1], dtype=torch.float64))

    def loss(e_w: torch.Tensor, e_l: torch.Tensor) -> torch.Tensor:
        drift = torch.full_like(e_w, 0.5).detach()
        pair = PairErrors(e_w, e_l, errors.reference_chosen, errors.reference_rejected, drift)
        return objective(pair, labels(7, torch.float64)).loss

    assert torch.autograd.gradcheck(loss, (chosen, rejected))


def frozen(objective: Objective, e_w: torch.Tensor, e_l: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The loss of a detached objective in plain words, its focus or kappa the number that it is at (e_w, e_l)."""

    def margin(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return -objective.beta / 2 * ((chosen - 300) - (rejected - 300))

    if isinstance(objective, DiffusionSDPO):  # kappa = (1 - mu) e_w / overlap, below 1 everywhere in `batch`
        kappa, constant = (1 - objective.mu) * e_w.detach() / 350, e_l.detach()
        return lambda chosen, rejected: torch.log1p((-margin(chosen, constant + kappa * (rejected - constant))).exp())
    # labels(): C_w - C_l = -2, and cost_weight is 1
    offset = -2.0 if isinstance(objective, SafetyConstrainedDPO) else 0.0
    p = torch.sigmoid(margin(e_w.detach(), e_l.detach()) + offset)
    focus = (1 - p if isinstance(objective, SafetyConstrainedDPO) else p) ** objective.gamma
    return lambda chosen, rejected: focus * torch.log1p((-margin(chosen, rejected) - offset).exp())


@pytest.mark.parametrize("objective", DETACHED, ids=name)
def test_gradient_of_what_is_detached_in_float64(objective: Objective):
    """Against central differences of the frozen loss; its value is the objective's own."""
    errors, chosen, rejected = batch(torch.tensor([-4.3, -1.2, 0.0, 0.3, 0.7, 1.4, 5.1], dtype=torch.float64))
    loss, constant = objective(errors, labels(7, torch.float64)).loss, frozen(objective, chosen, rejected)
    torch.testing.assert_close(loss, constant(chosen, rejected))
    step = 1e-4
    with torch.no_grad():
        slopes = [
            (constant(chosen + step, rejected) - constant(chosen - step, rejected)) / (2 * step),
            (constant(chosen, rejected + step) - constant(chosen, rejected - step)) / (2 * step),
        ]
    for gradient, slope in zip(torch.autograd.grad(loss.sum(), (chosen, rejected)), slopes, strict=True):
        assert (slope != 0).all()
        torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-9)


def test_no_objective_is_left_out():
    known = [getattr(lit_safety.objectives, exported) for exported in lit_safety.objectives.__all__]
    # DiffusionNFT scores single images: see test_nft.py.
    every = {one for one in known if isinstance(one, type) and issubclass(one, Objective)} - {Objective, DiffusionNFT}
    assert every == {type(objective) for objective in SMOOTH + DETACHED}


@pytest.mark.parametrize("objective", SMOOTH + DETACHED, ids=name)
def test_an_untrained_pair_moves_towards_the_safe_and_better_image(objective: Objective):
    """A step downhill lowers the chosen image's error and does not lower the rejected one's (DSPO leaves it alone)."""
    errors, chosen, rejected = batch(torch.zeros(1))
    objective(errors, labels(1)).loss.sum().backward()
    assert chosen.grad.item() > 0
    assert rejected.grad.item() == 0 if isinstance(objective, DSPO) else rejected.grad.item() < 0


@pytest.mark.parametrize("objective", SMOOTH + DETACHED, ids=name)
def test_what_is_logged_carries_no_gradient_and_is_one_number_a_pair(objective: Objective):
    errors, _, _ = batch(torch.zeros(3))
    for key, values in objective(errors, labels(3)).logs.items():
        assert values.shape == (3,), key
        assert not values.requires_grad, key


@pytest.mark.parametrize("kind", sorted({type(one) for one in (*SMOOTH, *DETACHED)}, key=lambda kind: kind.__name__))
def test_settings_that_are_no_finite_numbers_are_refused(kind: type[Objective]) -> None:
    """A nan would become a loss that is none, and the samples would be blamed for it."""
    for setting in inspect.signature(kind).parameters.values():
        if isinstance(setting.default, bool):
            continue
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=setting.name):
                kind(**{setting.name: value})
