"""The null space of clean inputs, TSV-M, Iso-C and SVC, written out by hand."""

from __future__ import annotations

import pytest
import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.core_space import Core, iso_c, null_space, project, svc, tsv_m
from lit_safety.merging.methods import mean, task_sum

torch.manual_seed(0)


def update(rows: list[list[float]], scale: float = 1.0) -> LowRank:
    a = torch.tensor(rows)
    return LowRank(a, torch.eye(len(a)), scale)


def close(found: LowRank, rows: list[list[float]]) -> None:
    torch.testing.assert_close(found.delta(), torch.tensor(rows).double(), rtol=1e-9, atol=1e-9)


def random_parts(count: int = 3, out: int = 8, inputs: int = 7, rank: int = 2) -> list[LowRank]:
    return [LowRank(torch.randn(rank, inputs), torch.randn(out, rank), 0.5) for _ in range(count)]


IDLE = LowRank(torch.zeros(0, 2), torch.zeros(2, 0))
ZERO = LowRank(torch.ones(1, 2), torch.zeros(2, 1))


def test_the_null_space_is_what_clean_inputs_do_not_use():
    """Eigenvalues 1000, 1, 0.1; below 5e-4 of the largest is 0.1 only, below 1e-2 the two."""
    gram = torch.diag(torch.tensor([1.0, 1000.0, 0.1]))
    assert null_space(gram, 5e-4).abs().T.tolist() == [[0.0, 0.0, 1.0]]
    assert null_space(gram, 1e-2).shape == (3, 2)
    assert null_space(torch.eye(3), 0.5).shape == (3, 0)
    assert null_space(torch.zeros(3, 3), 5e-4).shape == (3, 3), "nothing clean reaches the layer: all is free"


def test_a_projected_update_does_nothing_on_clean_inputs_and_keeps_its_rank():
    clean = torch.randn(7, 3)
    part = random_parts(1)[0]
    found = project(part, null_space(clean @ clean.T, 1e-4))
    assert (found.delta() @ clean.double()).abs().max() < 1e-5
    assert found.rank == part.rank
    free = torch.linalg.svd(clean.double()).U[:, 3:]
    torch.testing.assert_close(found.delta() @ free, part.delta() @ free, rtol=1e-5, atol=1e-5)


def test_the_core_holds_every_update_without_loss_after_a_projection_too():
    parts = random_parts()
    clean = torch.randn(7, 3)
    directions = null_space(clean @ clean.T, 1e-4)
    for some in (parts, [project(part, directions) for part in parts]):
        core = Core.of(some, [1.0, 2.0, -1.0])
        for weight, part, small in zip((1.0, 2.0, -1.0), some, core.small, strict=True):
            torch.testing.assert_close(core.left @ small @ core.right.T, weight * part.delta(), rtol=1e-6, atol=1e-6)


def test_tsv_m_by_hand():
    """Two updates of rank 2 in 2 x 2, so R = 2 and one triplet of each is kept: 3 e1 e1' of diag(3, 1), 5 e2 e2' of
    diag(1, 5). They are orthogonal already: diag(3, 5)."""
    close(tsv_m([update([[3.0, 0.0], [0.0, 1.0]]), update([[1.0, 0.0], [0.0, 5.0]])], [1.0, 1.0]), [[3, 0], [0, 5]])


def test_tsv_m_makes_directions_that_meet_orthogonal():
    """4 e1 e1' and 2 u u' with u = (e1 + e2) / sqrt 2. The nearest orthonormal pair lies 22.5 degrees outside of each:
    angles -22.5 and 67.5 degrees."""
    found = tsv_m([update([[4.0, 0.0], [0.0, 0.0]]), update([[1.0, 1.0], [1.0, 1.0]])], [1.0, 1.0])
    angles = torch.deg2rad(torch.tensor([-22.5, 67.5], dtype=torch.float64))
    first, second = (torch.stack([a.cos(), a.sin()]) for a in angles)
    torch.testing.assert_close(found.delta(), 4 * torch.outer(first, first) + 2 * torch.outer(second, second))


def test_tsv_m_of_more_experts_than_the_core_has_directions_is_not_empty():
    """R = 1, K = 3: floor(1/3) would keep nothing at all."""
    found = tsv_m([update([[1.0, 0.0]]), update([[2.0, 0.0]]), update([[4.0, 0.0]])], [1.0] * 3)
    assert found.delta().count_nonzero() == 1
    assert torch.isfinite(found.delta()).all()


def test_iso_c_by_hand():
    """diag(3, 0) + diag(0, 1): singular values 3 and 1, their mean 2. With weights 1 and 3: 3 and 3."""
    parts = [update([[3.0, 0.0], [0.0, 0.0]]), update([[0.0, 0.0], [0.0, 1.0]])]
    close(iso_c(parts, [1.0, 1.0]), [[2, 0], [0, 2]])
    close(iso_c(parts, [1.0, 3.0]), [[3, 0], [0, 3]])


def test_iso_c_leaves_alone_what_the_sum_does_not_use():
    """Twice the same update: the sum has one direction, and the others are neither counted nor used."""
    one = update([[2.0, 0.0], [0.0, 0.0]])
    close(iso_c([one, one], [1.0, 1.0]), [[4, 0], [0, 0]])
    gone = iso_c([one, one], [1.0, -1.0])
    assert gone.rank == 0
    assert gone.shape == (2, 2)


@pytest.mark.parametrize("method", [tsv_m, iso_c])
def test_experts_without_an_update_of_the_layer_count_nothing(method):
    one = update([[3.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(method([one, IDLE, ZERO], [1.0] * 3).delta(), method([one], [1.0]).delta())
    assert method([IDLE, ZERO], [1.0] * 2).rank == 0
    close(tsv_m([one], [1.0]), [[3, 0], [0, 1]])


def test_svc_by_hand():
    """W1 = diag(2, 0), W2 = diag(2, 1): the sum is diag(4, 1). Along e1 a = 4, a_k = 2 each: s = 2, 2, so
    4 * 2 / 4 = 2, once what each does. Along e2 a = 1, a_1 = 0: s = 1 (alpha), a_2 = 1: s = 1: 1 * 2 / 2 = 1."""
    parts = [update([[2.0, 0.0], [0.0, 0.0]]), update([[2.0, 0.0], [0.0, 1.0]])]
    close(svc(task_sum(parts, [1.0, 1.0]), parts, [1.0, 1.0], 1.0), [[2, 0], [0, 1]])


def test_svc_after_a_mean_with_alpha_of_one_kth():
    """The mean is diag(2, 0.5). Along e1 s = 1, 1: stays 2. Along e2 s = 1/2 (alpha), 0.5 / 1 = 1/2: 0.5 * 2 / 1 =
    1."""
    parts = [update([[2.0, 0.0], [0.0, 0.0]]), update([[2.0, 0.0], [0.0, 1.0]])]
    close(svc(mean(parts, [1.0, 1.0]), parts, [1.0, 1.0], 0.5), [[2, 0], [0, 1]])


def test_svc_leaves_updates_that_share_nothing_as_they_are():
    parts = [update([[2.0, 0.0], [0.0, 0.0]]), update([[0.0, 0.0], [0.0, 3.0]])]
    close(svc(task_sum(parts, [1.0, 1.0]), parts, [1.0, 1.0], 1.0), [[2, 0], [0, 3]])


def test_svc_is_not_wiped_out_by_an_expert_that_has_almost_no_part_in_a_direction():
    """Its row there is rounding: 0/0, or something huge."""
    parts = [update([[2.0, 0.0], [0.0, 0.0]]), update([[1e-7, 0.0], [0.0, 3.0]])]
    torch.testing.assert_close(
        svc(task_sum(parts, [1.0, 1.0]), parts, [1.0, 1.0], 1.0).delta(),
        torch.tensor([[2.0, 0.0], [0.0, 3.0]]).double(), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_svc_takes_whole_updates_and_empty_ones():
    """TIES and DARE leave no factors; experts that do nothing in the layer are not counted."""
    parts = [update([[2.0, 0.0], [0.0, 0.0]]), update([[2.0, 0.0], [0.0, 1.0]])]
    whole = task_sum(parts, [1.0, 1.0]).delta()
    close(svc(whole, [*parts, IDLE, ZERO], [1.0] * 4, 1.0), [[2, 0], [0, 1]])
    assert svc(task_sum([IDLE, ZERO], [1.0, 1.0]), [IDLE, ZERO], [1.0, 1.0], 1.0).delta().count_nonzero() == 0
    assert svc(torch.zeros(2, 2), [IDLE, ZERO], [1.0, 1.0], 1.0).rank == 0
