"""Which image of a round is in which batch: each once a pass, whole prompts, the same for any number of ranks."""

from __future__ import annotations

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch
from lit_safety.data.reading.order import Deal
from lit_safety.data.reading.position import DataPosition
from lit_safety.data.rounds import RoundData, RoundLoader, place_key, places_of


def test_a_key_says_round_prompt_and_image() -> None:
    assert places_of(place_key(12, 345, 6)) == (12, 345, 6)


def passes(data: RoundData, deal: Deal, count: int, position: DataPosition | None = None) -> list[list[PairBatch]]:
    loader = RoundLoader(data, deal, position or DataPosition())
    return [list(loader) for _ in range(count)]


def test_every_image_is_once_in_a_pass_with_the_others_of_its_prompt() -> None:
    data = RoundData(prompts_per_round=6, images_per_prompt=3, passes=2, batch_size=2, seed=1)
    found = passes(data, Deal(2), 4)
    for number, batches in enumerate(found):
        keys = [key for batch in batches for key in batch.keys]
        assert sorted(keys) == [place_key(number // 2, prompt, image) for prompt in range(6) for image in range(3)]
        for batch in batches:
            assert len(batch) == 6
            for start in (0, 3):
                assert len({places_of(key)[1] for key in batch.keys[start : start + 3]}) == 1
                assert len(set(batch.noise_seeds[start : start + 3])) == 1  # timestep and noise are the prompt's
            assert len(set(batch.seeds)) == 6
    orders = [[key[6:] for batch in batches for key in batch.keys] for batches in found]
    assert len({tuple(order) for order in orders}) == 4
    assert found[0][0].noise_seeds != found[2][0].noise_seeds


def test_ranks_and_micro_batches_share_what_one_process_has() -> None:
    data = RoundData(prompts_per_round=8, images_per_prompt=2, batch_size=4)
    whole = passes(data, Deal(4), 1)[0]
    parts = [passes(data, Deal(1, rank, 2, accumulate=2), 1)[0] for rank in range(2)]
    for step, batch in enumerate(whole):
        micro = [parts[rank][2 * step + number] for number in range(2) for rank in range(2)]
        assert [key for one in micro for key in one.keys] == batch.keys
        assert [seed for one in micro for seed in one.noise_seeds] == batch.noise_seeds


def test_a_pass_goes_on_where_it_stopped() -> None:
    data = RoundData(prompts_per_round=6, images_per_prompt=2, batch_size=2)
    position = DataPosition()
    first = iter(RoundLoader(data, Deal(2), position))
    before = [next(first), next(first)]
    other = DataPosition()
    other.load_state_dict(position.state_dict())
    rest = passes(data, Deal(2), 1, other)[0]
    whole = passes(data, Deal(2), 1)[0]
    assert [batch.keys for batch in before + rest] == [batch.keys for batch in whole]
    assert [batch.seeds for batch in before + rest] == [batch.seeds for batch in whole]


@pytest.mark.parametrize(
    "settings", [{"prompts_per_round": 0}, {"images_per_prompt": 1}, {"images_per_prompt": 99}, {"passes": 0}]
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        RoundData(**settings)  # type: ignore[arg-type]
