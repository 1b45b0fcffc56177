import torch

from lit_safety.merging.methods import ties

DELTAS = torch.tensor([[[4.0, -1.0], [2.0, 0.5]], [[-2.0, 3.0], [6.0, -0.1]], [[1.0, 5.0], [-3.0, 0.2]]])


def test_by_hand():
    """Density 1/2 keeps the two largest magnitudes of each:

    delta_1  4 0;  2 0     delta_2  0 3; 6 0     delta_3  0 5; -3 0
    sums     4 8;  5 0     signs    + +; + 0
    means    4/1 (3+5)/2; (2+6)/2 (the -3 disagrees) 0
    """
    assert ties(DELTAS, density=0.5).tolist() == [[4.0, 4.0], [4.0, 0.0]]


def test_without_trimming_only_the_signs_decide():
    """Sums 3 7; 5 .6 are all positive: (4+1)/2 (3+5)/2; (2+6)/2 (.5+.2)/2"""
    torch.testing.assert_close(ties(DELTAS, density=1.0), torch.tensor([[2.5, 4.0], [4.0, 0.35]]))


def test_weights_multiply_before_the_sign_is_elected():
    """Weights 1, 3, 1 at density 1: entry (0, 0) sums to 4 - 6 + 1 < 0, so it is -6 alone."""
    assert ties(DELTAS, 1.0, torch.tensor([1.0, 3.0, 1.0]))[0, 0] == -6.0


def test_entries_equal_at_the_limit_are_all_kept():
    """Keeping 1 of 2 2; 1 0 keeps both 2s: which one comes first must not decide."""
    assert ties(torch.tensor([[[2.0, 2.0], [1.0, 0.0]]]), density=0.25).tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_a_missing_update_takes_no_part():
    assert ties(torch.stack([DELTAS[0], torch.zeros(2, 2)]), 1.0).tolist() == DELTAS[0].tolist()
