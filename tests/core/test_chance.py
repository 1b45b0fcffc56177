from __future__ import annotations

import torch

from lit_safety.core.chance import derive, generator, integers, normal, sample_seed, uniform


def test_the_numbers_are_those_of_every_other_machine() -> None:
    """Fixed once: another Python, platform or release that gives others breaks every resume and every comparison."""
    seed = sample_seed(0, 0, "00001")
    assert seed == 5464469086132621757
    assert derive(seed, "timestep") == 7050859103821788515


def test_every_part_matters_and_parts_do_not_run_together() -> None:
    variants = {
        sample_seed(*parts) for parts in [(0, 0, "1"), (1, 0, "1"), (0, 1, "1"), (0, 0, "2"), (0, 11, ""), (0, 1, "11")]
    }
    assert len(variants) == 6
    assert all(0 <= seed < 1 << 63 for seed in variants)
    assert derive(1, "noise") != derive(1, "timestep")


def test_uniform_and_integers_are_even() -> None:
    seeds = [sample_seed(0, 0, str(number)) for number in range(4000)]
    draws = torch.tensor([uniform(seed, "x", 2.0, 4.0) for seed in seeds])
    assert 2.0 <= draws.min() < 2.01
    assert 3.99 < draws.max() < 4.0
    assert abs(draws.mean() - 3.0) < 0.05  # five standard errors of 2/sqrt(12 * 4000)
    counts = integers(seeds, "t", 10, low=5).bincount(minlength=10)
    assert counts[:5].sum() == 0
    assert counts[5:].min() > 700  # 800 expected, standard deviation 25


def test_noise_does_not_depend_on_the_batch() -> None:
    together = normal([3, 4, 5], "noise", (2, 3))
    assert together.shape == (3, 2, 3)
    assert torch.equal(together[1:2], normal([4], "noise", (2, 3)))
    assert torch.equal(together[2], torch.randn(2, 3, generator=generator(5, "noise")))
    assert not torch.equal(together[0], together[1])
