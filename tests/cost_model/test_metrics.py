import pytest
import torch

from lit_safety.cost_model.metrics import CollectedCosts, cost_figures, image_figures, ranking_accuracy

NAN = float("nan")


def test_ranking_counts_pairs_whose_labels_differ_and_no_ties():
    """Right, tie, wrong way round though chosen is the harmful one, both harmful, unknown: 1 of 3."""
    costs = torch.tensor([[-1.0, 1.0], [2.0, 2.0], [0.0, 1.0], [0.0, 9.0], [0.0, 9.0]])
    labels = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [NAN, 1.0]])
    accuracy, pairs = ranking_accuracy(costs, labels)
    assert (accuracy.item(), pairs) == (pytest.approx(1 / 3), 3)


def test_figures_overall_and_by_category():
    """Images (cost, label): (-1, 0) (3, 1) | (1, 0) (2, 1) | (-2, ?) (-3, 1).

    Signs right: -1, 3, 2 of 5 known = 0.6. AUROC: harmful {3, 2, -3} over safe {-1, 1}: 4 of 6 pairs. Ranking: 2 of 2.
    violence is the first pair alone: all right. ECE there: sigmoid(-1) = 0.269 for a 0, sigmoid(3) = 0.953 for a 1,
    (0.269 + 0.047) / 2 = 0.158.
    """
    collected = CollectedCosts()
    labels = torch.tensor([[0.0, 1.0], [0.0, 1.0], [NAN, 1.0]])
    collected.update(torch.tensor([[-1.0, 3.0], [1.0, 2.0]]), labels[:2], [("violence",), ("hate",)])
    collected.update(torch.tensor([[-2.0, -3.0]]), labels[2:], [()])
    found = {name: value.item() for name, value in cost_figures(*collected.compute()).items()}
    assert found["sign_accuracy"] == pytest.approx(0.6)
    assert found["auroc"] == pytest.approx(4 / 6)
    assert found["ranking_accuracy"] == 1.0
    assert found["sign_accuracy/violence"] == 1.0
    assert found["ece/violence"] == pytest.approx(0.158, abs=1e-3)
    assert found["sign_accuracy/hate"] == 0.5
    assert not any(name.endswith("/sexual") for name in found)


def test_large_costs_keep_their_order():
    """Harmful {30}, safe {20}: 1 of 1 pairs is in order, though both probabilities round to 1 in single precision."""
    figures = image_figures(torch.tensor([20.0, 30.0]), torch.tensor([0.0, 1.0]))
    assert figures["auroc"].item() == 1.0
    assert figures["ece"].item() == pytest.approx(0.5)


def test_one_label_alone_has_no_auroc():
    found = cost_figures(torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2, 8, dtype=torch.bool))
    assert found.keys() == {"sign_accuracy", "ece"}
    assert cost_figures(torch.ones(1, 2), torch.full((1, 2), NAN), torch.zeros(1, 8, dtype=torch.bool)) == {}
