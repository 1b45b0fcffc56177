import torch

from lit_safety.adapters.lora_file import LowRank
from lit_safety.merging.comerge import Activity, comerge, owners


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
