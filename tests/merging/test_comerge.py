import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.methods import Activity, comerge, comerge_weights, owners


def measured(a: list) -> Activity:
    """From a[k][i][j]: experts, prompts, output units."""
    activations = torch.tensor(a, dtype=torch.float64)
    activity = Activity.empty(activations.shape[0], activations.shape[2])
    for i in range(activations.shape[1]):  # a batch each
        activity.add(activations[:, i : i + 1])
    return activity


# Two experts, three prompts, four units:
#   unit 0  expert 0: 1 1 0, expert 1: 0 0 9    votes 2 : 1, means 2/3 : 3
#   unit 1  expert 0: 1 0 0, expert 1: 2 1 5    votes 0 : 3
#   unit 2  expert 0: 4 4 4, expert 1: 1 1 1    votes 3 : 0
#   unit 3  equal in every prompt: each tie is counted for expert 0
A = [[[1, 1, 4, 7], [1, 0, 4, 7], [0, 0, 4, 7]], [[0, 2, 1, 7], [0, 1, 1, 7], [9, 5, 1, 7]]]


def test_votes_and_sums_by_hand():
    activity = measured(A)
    assert activity.votes.tolist() == [[2, 0, 3, 3], [1, 3, 0, 0]]
    assert activity.total.tolist() == [[2, 1, 12, 21], [9, 8, 3, 21]]


def test_vote_and_magnitude_decide_differently():
    assert owners(measured(A), "vote").tolist() == [0, 1, 0, 0]
    assert owners(measured(A), "magnitude").tolist() == [1, 1, 0, 0]


def test_a_tie_of_votes_goes_to_the_larger_mean_and_then_to_the_first():
    """Two prompts, one vote each. Unit 0: sums 3 and 5. Unit 1: sums 4 and 4."""
    activity = measured([[[3, 4], [0, 0]], [[0, 0], [5, 4]]])
    assert activity.votes.tolist() == [[1, 1], [1, 1]]
    assert owners(activity, "vote").tolist() == [1, 0]


def test_batches_do_not_matter():
    whole = Activity.empty(2, 4)
    whole.add(torch.tensor(A, dtype=torch.float64))
    assert torch.equal(whole.votes, measured(A).votes)
    assert torch.equal(whole.total, measured(A).total)


def test_rows_by_hand():
    """Rows of the products, 3 x 2, owners 1 0 1:

    delta_1 = [1 2 3]^T [1 1] = 1 1; 2 2; 3 3      delta_2 = 2 [1 0 1]^T [5 0] = 10 0; 0 0; 10 0
    merged  = 10 0; 2 2; 10 0, of rank 2
    """
    one = LowRank(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    two = LowRank(torch.tensor([[5.0, 0.0]]), torch.tensor([[1.0], [0.0], [1.0]]), scale=2.0)
    merged = comerge([one, two], torch.tensor([1, 0, 1]))
    assert merged.delta().tolist() == [[10.0, 0.0], [2.0, 2.0], [10.0, 0.0]]
    assert merged.rank == 2
    alone = comerge([one, two], torch.tensor([0, 0, 0]))
    assert alone.a is one.a
    assert alone.b is one.b


def test_normalised_activity_by_hand():
    """One prompt, two units. Expert 0: 8 4, mean 6, relative 4/3 2/3; expert 1: 1 3, mean 2, relative 1/2 3/2.

    Raw, the larger expert owns both units; relative to its own mean each owns the one it is made for. An expert that
    does nothing (0 0) stays at 0 and owns nothing.
    """
    activity = measured([[[8, 4]], [[1, 3]], [[0, 0]]])
    for statistic in ("vote", "magnitude"):
        assert owners(activity, statistic).tolist() == [0, 0]
        assert owners(activity, statistic, normalise=True).tolist() == [0, 1]
    torch.testing.assert_close(activity.relative_total, torch.tensor([[4 / 3, 2 / 3], [0.5, 1.5], [0, 0]]).double())


def test_an_experts_size_does_not_matter_when_normalised():
    """All of expert 1 a hundred times as active: the owners are the same ones."""
    drawn = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    larger = drawn * torch.tensor([1.0, 100.0]).double()[:, None, None]
    one, other = measured(drawn.tolist()), measured(larger.tolist())
    assert owners(other, "vote").tolist() == [1] * 5
    for statistic in ("vote", "magnitude"):
        found = owners(other, statistic, normalise=True)
        assert torch.equal(found, owners(one, statistic, normalise=True))
        assert 0 < int(found.sum()) < 5


def test_single_weights_by_hand():
    """|delta_1| = 4 1; 0 2 and |delta_2| = 3 3; 0 1, so that the larger are 4 3; 0 2, a tie going to the first.

    With E|x| = 1 3 the products are 4 3; 0 6 (mean 13/4) and 3 9; 0 3 (mean 15/4), in units of their means
    1.23 0.92; 0 1.85 and 0.8 2.4; 0 0.8: the same picks. With E|x| = 3 0 they are 12 0; 0 0 (mean 3) and 9 0; 0 0 (mean
    9/4), in units of their means 4 and 4: a tie, which goes to the first, as do the zeros.
    """
    deltas = torch.tensor([[[4.0, 1.0], [0.0, -2.0]], [[-3.0, 3.0], [0.0, 1.0]]])
    merged, owner = comerge_weights(deltas, None)
    assert merged.tolist() == [[4.0, 3.0], [0.0, -2.0]]
    assert owner.tolist() == [[0, 1], [0, 0]]
    assert comerge_weights(deltas, torch.tensor([1.0, 3.0]))[0].tolist() == merged.tolist()
    assert comerge_weights(deltas, torch.tensor([3.0, 0.0]))[0].tolist() == [[4.0, 1.0], [0.0, -2.0]]


def test_single_weights_of_a_larger_expert_when_normalised():
    """delta_2 = 10 delta_1 turned round: 1 2 and 20 10. Plainly all are the second's; in units of the means 1.5 and 15
    they are 2/3 4/3 and 4/3 2/3: one each."""
    deltas = torch.tensor([[[1.0, 2.0]], [[20.0, 10.0]]])
    assert comerge_weights(deltas, None)[0].tolist() == [[20.0, 10.0]]
    assert comerge_weights(deltas, torch.ones(2))[0].tolist() == [[20.0, 2.0]]
