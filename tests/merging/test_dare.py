import pytest
import torch

from lit_safety.merging.methods import dare, dare_sum


def test_by_hand():
    """Seed 0 draws 0.4963 0.7682; 0.0885 0.1320: at drop 0.25 the lower row goes, the upper is divided by 3/4."""
    delta = torch.tensor([[3.0, 6.0], [9.0, 12.0]])
    found = dare(delta, drop=0.25, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.tensor([[4.0, 8.0], [0.0, 0.0]]))


def test_the_mean_over_draws_is_the_update():
    delta = torch.full((200, 200), 2.0)
    found = dare(delta, drop=0.5, generator=torch.Generator().manual_seed(1))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(2.0, abs=0.05)


def test_the_draw_belongs_to_seed_expert_and_layer():
    ones = [torch.ones(8, 8), torch.ones(8, 8)]

    def draw(seed: int = 0, names: tuple[str, str] = ("a", "b"), layer: str = "x") -> torch.Tensor:
        return dare_sum(ones, [1.0, 10.0], 0.5, seed, names, layer)

    assert torch.equal(draw(), draw())
    assert torch.equal(draw(), dare_sum(ones, [10.0, 1.0], 0.5, 0, ("b", "a"), "x"))
    for other in (draw(seed=1), draw(layer="y"), draw(names=("c", "d"))):
        assert not torch.equal(draw(), other)
