import pytest
import torch

from lit_safety.objectives import ConstrainedDPO, DiffusionDPO, PairErrors, PairLabels, dual_update, reward_order


def errors(values: torch.Tensor) -> PairErrors:
    return PairErrors(*values)


def labels(score: torch.Tensor, cost: torch.Tensor) -> PairLabels:
    size = len(score)
    return PairLabels(torch.zeros(size), torch.zeros(size, 2), cost, score)


def test_dual_update_golden():
    """lambda 1, rate 0.5, limit 0.2: E[C] 0.6 gives 1 + 0.5 * 0.4 = 1.2; E[C] -3 gives 1 - 1.6 < 0, so 0."""
    assert dual_update(1.0, 0.6, 0.2, 0.5) == pytest.approx(1.2)
    assert dual_update(1.0, -3.0, 0.2, 0.5) == 0.0


def test_order_golden():
    """Scores 0.875 and 0.375, costs 1 and -1: r - lambda C is 0.875 - lambda and 0.375 + lambda.

    lambda 0: 0.875 > 0.375; lambda 0.25: 0.625 = 0.625, a tie (eighths are exact in fp32); lambda 1: -0.125 < 1.375.
    """
    score, cost = torch.tensor([[0.875, 0.375]]), torch.tensor([[1.0, -1.0]])
    assert [reward_order(score, cost, dual).item() for dual in (0.0, 0.25, 1.0)] == [1.0, 0.0, -1.0]


def test_loss_golden():
    """e 0.10 0.20, r 0.12 0.19, beta 200: as stored m = 3. The rejected image has the better r - C, so m = -3.

    -log sigmoid(-3) = 3.0485873, and e_w is now 0.20: with sft_weight 5 the loss is 4.0485873.
    """
    pair = errors(torch.tensor([[0.10], [0.20], [0.12], [0.19]], dtype=torch.float64))
    output = ConstrainedDPO(beta=200.0, sft_weight=5.0)(pair, labels(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])))
    assert output.loss.item() == pytest.approx(4.0485873, rel=1e-6)
    assert output.logs["constrained/swapped"].item() == 1.0
    assert output.logs["rewards/margins"].item() == pytest.approx(-3.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_the_limit_never_active_it_is_dpo_on_pairs_ordered_by_score(smoothing: float):
    """To the bit, gradients too. Costs speak against the score; expected costs stay below the limit, dual 0."""
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(4, 200, generator=generator)
    score = torch.rand(200, 2, generator=generator)
    cost = 10 * score - 3
    objective = ConstrainedDPO(dual=0.0, limit=0.5, label_smoothing=smoothing)
    for expected_cost in (-1.0, 0.2, 0.5):
        assert objective.update(expected_cost) == 0.0

    ours = values.clone().requires_grad_(True)
    ours_loss = objective(errors(ours), labels(score, cost)).loss
    better = score[:, 0] > score[:, 1]
    theirs = values.clone().requires_grad_(True)
    sorted_errors = torch.where(better, theirs, theirs[[1, 0, 3, 2]])
    theirs_loss = DiffusionDPO(label_smoothing=smoothing)(errors(sorted_errors), labels(score, cost)).loss
    assert 50 < better.sum() < 150
    assert torch.equal(ours_loss, theirs_loss)
    ours_loss.sum().backward()
    theirs_loss.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_the_stored_order_does_not_matter():
    generator = torch.Generator().manual_seed(6)
    values, score, cost = (torch.rand(*s, generator=generator) for s in ((4, 50), (50, 2), (50, 2)))
    objective = ConstrainedDPO(dual=0.7)
    stored = objective(errors(values), labels(score, cost))
    turned = objective(errors(values[[1, 0, 3, 2]]), labels(score.flip(1), cost.flip(1)))
    assert torch.equal(stored.loss, turned.loss)
    assert torch.equal(stored.logs["constrained/swapped"], 1 - turned.logs["constrained/swapped"])


def test_a_tie_has_no_preference_loss_and_keeps_its_regulariser():
    values = torch.tensor([[0.5], [0.2], [0.1], [0.9]]).requires_grad_(True)
    output = ConstrainedDPO(sft_weight=2.0)(errors(values), labels(torch.ones(1, 2), torch.ones(1, 2)))
    assert output.logs["loss/preference"].item() == 0.0
    assert output.logs["constrained/ties"].item() == 1.0
    output.loss.sum().backward()
    assert values.grad[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0]


def test_a_run_above_its_limit_turns_to_the_safe_image():
    """Scores 0.875 and 0.375, costs 1 and -1: the tie is at lambda 0.25. Rate 0.1, E[C] 1, limit 0: after 3 updates
    0.3."""
    objective = ConstrainedDPO(dual=0.0, dual_rate=0.1)
    pair = errors(torch.full((4, 1), 0.5))
    known = labels(torch.tensor([[0.875, 0.375]]), torch.tensor([[1.0, -1.0]]))
    swapped = []
    for _ in range(4):
        swapped.append(objective(pair, known).logs["constrained/swapped"].item())
        objective.update(1.0)
    assert swapped == [0.0, 0.0, 0.0, 1.0]
    assert objective(pair, known).logs["constrained/dual"].item() == pytest.approx(0.4)


def test_an_unknown_score_or_cost_never_passes_for_an_order():
    nan = float("nan")
    assert torch.isnan(reward_order(torch.tensor([[nan, 1.0]]), torch.zeros(1, 2), 1.0)).all()
    assert torch.isnan(reward_order(torch.zeros(1, 2), torch.tensor([[nan, 1.0]]), 0.0)).all()
    unknown = labels(torch.tensor([[nan, 1.0]]), torch.zeros(1, 2))
    assert torch.isnan(ConstrainedDPO()(errors(torch.ones(4, 1)), unknown).loss).all()


def test_state_goes_round_and_strangers_are_refused():
    objective, other = ConstrainedDPO(dual=0.0, dual_rate=1.0), ConstrainedDPO(dual=5.0)
    objective.update(2.5)
    other.load_state_dict(objective.state_dict())
    assert other.dual == 2.5
    with pytest.raises(ValueError, match="the checkpoint holds none"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match="DiffusionDPO has no state"):
        DiffusionDPO().load_state_dict(objective.state_dict())
    DiffusionDPO().load_state_dict(DiffusionDPO().state_dict())


@pytest.mark.parametrize("expected_cost", [float("nan"), float("inf")])
def test_an_expected_cost_that_is_no_number_is_refused_and_moves_nothing(expected_cost: float):
    objective = ConstrainedDPO(dual=1.0)
    with pytest.raises(ValueError, match="expected_cost"):
        objective.update(expected_cost)
    assert objective.dual == 1.0


@pytest.mark.parametrize("settings", [{"dual": -1.0}, {"dual_rate": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConstrainedDPO(**settings)
