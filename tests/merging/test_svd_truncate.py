import pytest
import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.methods import reduce_rank, svd_of_dense, svd_truncate


def test_by_hand():
    """2 [1 0; 0 1] [3 0; 0 1] = diag(6, 2); its best rank-1 approximation is diag(6, 0)."""
    layer = LowRank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2), scale=2.0)
    found = svd_truncate(layer, 1)
    assert found.rank == 1
    torch.testing.assert_close(found.delta(), torch.tensor([[6.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert svd_truncate(layer, 2) is layer
    with pytest.raises(ValueError, match="at least 1"):
        svd_truncate(layer, 0)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_it_is_the_best_approximation(shape: tuple[int, int]):
    """Its error is the norm of the singular values that are left out, from factors and from the whole update."""
    generator = torch.Generator().manual_seed(0)
    out, inputs = shape
    layer = LowRank(torch.randn(9, inputs, generator=generator), torch.randn(out, 9, generator=generator), 0.3)
    whole = layer.delta()
    left_out = torch.linalg.svdvals(whole)[4:].norm()
    for found in (svd_truncate(layer, 4), svd_of_dense(whole, 4)):
        assert found.rank == 4
        assert found.shape == shape
        torch.testing.assert_close((found.delta() - whole).norm(), left_out, rtol=1e-6, atol=0)


def test_a_whole_update_of_low_rank_is_found_exactly():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(40, 3, generator=generator).double() @ torch.randn(3, 25, generator=generator).double()
    found = svd_of_dense(whole, 8)
    assert found.rank == 3
    torch.testing.assert_close(found.delta(), whole, rtol=1e-10, atol=1e-10)
    assert svd_of_dense(torch.zeros(4, 3), 2).rank == 0


@pytest.mark.parametrize(("shape", "rank"), [((4, 9), 12), ((9, 4), 12), ((9, 4), 4)])
def test_a_rank_above_the_layers_sides_is_reduced_exactly(shape: tuple[int, int], rank: int):
    generator = torch.Generator().manual_seed(0)
    out, inputs = shape
    layer = LowRank(torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator), 0.7)
    found = reduce_rank(layer)
    assert found.rank == min(rank, out, inputs)
    torch.testing.assert_close(found.delta(), layer.delta(), rtol=1e-12, atol=1e-12)
