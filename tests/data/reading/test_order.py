from __future__ import annotations

import itertools

import pytest

from lit_safety.data.reading.order import Deal, EpochOrder

COUNTS = (7, 0, 5, 9, 1, 6, 6)


def whole(order: EpochOrder) -> list[tuple[int, int]]:
    return [tuple(sample) for window in order.windows for sample in order.samples(window).tolist()]


def everything() -> list[tuple[int, int]]:
    return [(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)]


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_a_pass_holds_every_sample_once(window: int) -> None:
    order = EpochOrder(COUNTS, seed=3, epoch=1, window=window)
    assert order.total == sum(COUNTS)
    assert sorted(whole(order)) == everything()
    assert whole(order) == whole(EpochOrder(COUNTS, seed=3, epoch=1, window=window))


def test_seed_and_epoch_change_the_order_and_nothing_else_is_needed() -> None:
    orders = [whole(EpochOrder(COUNTS, seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    # Fixed once: a release that orders otherwise breaks every resume.
    assert whole(EpochOrder((3, 2), 0))[:5] == [(1, 0), (0, 0), (0, 1), (0, 2), (1, 1)]


def test_samples_are_mixed_within_a_window_only() -> None:
    order = EpochOrder(COUNTS, seed=0, window=2)
    for window in order.windows:
        assert len(window.shards) <= 2
        assert {shard for shard, _ in order.samples(window).tolist()} <= set(window.shards)
        assert all(order.window_at(position) is window for position in (window.start, window.stop - 1))
    with pytest.raises(IndexError, match="position 34 of 34"):
        order.window_at(34)


def test_without_a_seed_the_stored_order_is_kept() -> None:
    assert whole(EpochOrder(COUNTS, seed=None, window=2)) == everything()


@pytest.mark.parametrize(
    ("world", "batch_size", "accumulate"), [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2)]
)
def test_every_deal_steps_on_the_same_samples(world: int, batch_size: int, accumulate: int) -> None:
    """Steps of 8 out of 34: four steps of positions 0-7, 8-15, 16-23, 24-31; two samples are left over."""
    deals = [Deal(batch_size, rank, world, accumulate) for rank in range(world)]
    assert {deal.batches(34) for deal in deals} == {4 * accumulate}
    assert deals[0].dropped(34) == 2
    for step in range(4):
        batches = range(step * accumulate, (step + 1) * accumulate)
        seen = [position for deal in deals for batch in batches for position in range(*deal.span(batch, 34))]
        assert sorted(seen) == list(range(step * 8, step * 8 + 8))


@pytest.mark.parametrize(("total", "world", "repeats"), [(11, 1, 0), (11, 2, 0), (12, 2, 0), (13, 2, 1), (3, 4, 2)])
def test_evaluation_loses_nothing(total: int, world: int, repeats: int) -> None:
    """Batches of 2: 11 samples are 6 batches; 13 are 7, so two ranks repeat one; 3 are 2, so four ranks repeat two."""
    deals = [Deal(2, rank, world, ragged=True) for rank in range(world)]
    assert {deal.repeated(total) for deal in deals} == {repeats}
    spans = [deal.span(batch, total) for deal in deals for batch in range(deal.batches(total))]
    assert len(spans) - len(set(spans)) == repeats
    assert sorted(position for span in set(spans) for position in range(*span)) == list(range(total))
