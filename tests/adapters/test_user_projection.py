import pytest
import torch

from lit_safety.adapters.user_attention import UserProjection, statistics


def small() -> UserProjection:
    """D = 2, N = 2, d_ctx = 2."""
    projection = UserProjection(2, 2, tokens=2)
    with torch.no_grad():
        projection.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
        projection.linear.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        projection.norm.weight.copy_(torch.tensor([1.0, 10.0]))
        projection.null_tokens.copy_(torch.tensor([[5.0, 1.0], [0.0, 2.0]]))
    return projection


def test_projection_golden():
    """Users (1, 10) and (3, 10): mean (2, 10), std (sqrt 2, 1; the second dimension is constant).

    User (4, 9): standardised (2 / sqrt 2, -1 / 1) = (1.41421, -1).
    Linear: (1.41421, -1, 2.82843, -3 + 1 = -2) -> tokens (1.41421, -1) and (2.82843, -2).
    LayerNorm over two numbers a > b is (1, -1) up to eps; times the weight (1, 10): (1, -10), twice.
    The null user (5, 1) and (0, 2): (1, -10) and (-1, 10).
    """
    projection = small()
    projection.standardise_by(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
    torch.testing.assert_close(projection.mean, torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(projection.std, torch.tensor([2.0**0.5, 1.0]))
    tokens = projection(torch.tensor([[4.0, 9.0], [4.0, 9.0]]), torch.tensor([True, False]))
    expected = torch.tensor([[[1.0, -10.0], [1.0, -10.0]], [[1.0, -10.0], [-1.0, 10.0]]])
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_unknown_users_do_not_matter():
    projection = small()
    wild = torch.tensor([[float("nan"), float("inf")], [1.0, 2.0]])
    known = torch.tensor([False, True])
    tokens = projection(wild, known)
    assert torch.equal(tokens[0], projection(torch.zeros(1, 2), torch.tensor([False]))[0])
    tokens.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in projection.parameters() if p.grad is not None)


@pytest.mark.parametrize("known", [[True, True], [False, False]])
def test_every_parameter_has_a_gradient_whoever_is_known(known: list[bool]):
    """A rank whose batch has no null user must still join the reduction of its gradient."""
    projection = small()
    (projection(torch.ones(2, 2), torch.tensor(known)) ** 2).sum().backward()
    assert all(p.grad is not None for p in projection.parameters())


def test_collinear_users_are_distinguished():
    """Two users at a cosine above 0.99 are at most orthogonal once standardised over many."""
    generator = torch.Generator().manual_seed(0)
    users = 10 + torch.randn(50, 64, generator=generator)
    assert torch.nn.functional.cosine_similarity(users[0], users[1], dim=0) > 0.98
    mean, std = statistics(users)
    standardised = (users - mean) / std
    assert torch.nn.functional.cosine_similarity(standardised[0], standardised[1], dim=0).abs() < 0.5


def test_the_network_around_it_may_be_halved():
    projection = small()
    projection.mean.fill_(1.0001)
    around = torch.nn.ModuleList([projection, torch.nn.Linear(2, 2)]).to(torch.bfloat16)
    assert around[1].weight.dtype is torch.bfloat16
    assert {t.dtype for t in projection.state_dict().values()} == {torch.float32}
    assert projection.mean[0] == torch.tensor(1.0001)
    with torch.autocast("cpu", torch.bfloat16):
        assert projection(torch.ones(1, 2)).dtype is torch.float32


def test_one_user_has_no_deviation():
    with pytest.raises(ValueError, match="two users"):
        statistics(torch.ones(1, 3))
