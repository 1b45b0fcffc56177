"""What a round draws: which prompts, from which seeds, and how a prompt is changed where nothing safe was drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from lit_safety.drawing.prompts import Prompt
from lit_safety.generation.words import Words
from lit_safety.modules.rounds import (
    Explore,
    Round,
    explored_slots,
    first_images,
    first_slots,
    more_slots,
    round_file,
    round_prompts,
    weights_digest,
)

HARMLESS = ["a red cat in the park", "a blue house on the street", "in the room there is a star"]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"a gun beside a red cat {i}", "explicit", "violence", "gun", (), False, i) for i in range(count)]


def test_every_prompt_comes_once_before_any_comes_twice() -> None:
    rows = prompts(7)
    drawn = [row.seed for number in range(7) for row in round_prompts(rows, 3, 5, number)]
    assert all(Counter(drawn[start : start + 7]) == Counter(range(7)) for start in (0, 7, 14))
    assert drawn[:7] != drawn[7:14]
    assert [row.seed for row in round_prompts(rows, 3, 6, 0)] != drawn[:3]


def test_images_are_of_the_prompt_as_it_is_or_explored_where_nothing_was_safe() -> None:
    explore = Explore(share=0.5, guards=[SafeLatentDiffusion()], guidance=[7.5], temperature=[0.9])
    assert explore.names == ["drop", "nearest", "guard 0", "guidance 7.5", "temperature 0.9"]
    assert [first_images(n, explore) for n in (2, 4, 6)] == [1, 2, 3]
    assert first_images(4, None) == 4
    assert explore.guard("guard 0") is explore.guards[0]
    rows, words = prompts(3), Words(HARMLESS)
    first = first_slots(rows, 2, 0, 1)
    more = more_slots(rows, [1], range(2, 6), 0, 1)
    assert all(slot.counts for slot in first)
    assert not any(slot.counts for slot in more)  # else prompts that draw safe images would count more often
    assert len({slot.seed for slot in first + more}) == 2 * 3 + 4
    of_first = {(slot.prompt, slot.image): slot.seed for slot in first}
    for way, texts in (
        ("drop", {"a a red cat"}),
        ("guard 0", {row.prompt for row in rows}),
        ("temperature 0.9", {row.prompt for row in rows}),
        ("nearest", {HARMLESS[0]}),
    ):
        explored = explored_slots(rows, [0, 2], range(2, 6), way, words, 0, 1)
        assert explored == explored_slots(rows, [0, 2], range(2, 6), way, words, 0, 1)
        assert [(slot.prompt, slot.image) for slot in explored] == [(p, i) for p in (0, 2) for i in range(2, 6)]
        assert {slot.text for slot in explored} <= texts
        assert {slot.way for slot in explored} == {way}
        assert all((slot.kept < 1.0) == (way in ("drop", "nearest")) for slot in explored)
        # From the noise of the image that it is compared with.
        assert all(slot.seed == of_first[slot.prompt, slot.image % 2] for slot in explored)
    assert [slot.seed for slot in first_slots(rows, 2, 0, 2)] != [slot.seed for slot in first]


def test_a_way_names_its_number_exactly() -> None:
    """Six digits name most numbers; of others all of them, since what is drawn must follow from what is recorded."""
    explore = Explore(guidance=[2, 7.5], temperature=[0.8, 1.23456789])
    assert explore.guidance == {"guidance 2": 2.0, "guidance 7.5": 7.5}
    assert explore.temperature == {"temperature 0.8": 0.8, "temperature 1.23456789": 1.23456789}


@pytest.mark.parametrize(
    "settings",
    [
        {"ways": []}, {"ways": ["shout"]}, {"share": 1.0}, {"guidance": [0.5]}, {"guidance": [2, 2.0]},
        {"ways": ["drop", "drop"]}, *({"temperature": [0.9, bad]} for bad in (0.9, 0.0, -0.5, 1.0, 2.5, float("nan"))),
    ],
)  # fmt: skip
def test_ways_that_cannot_be_meant_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"explore"):
        Explore(**settings)  # type: ignore[arg-type]


def test_a_round_is_read_back_whole_and_only_as_what_it_is(tmp_path: Path) -> None:
    slots = first_slots(prompts(2), 2, 0, 3)
    made = Round(3, "this", slots, torch.randn(4, 2, 3, 3), torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.zeros(4))
    made.write(tmp_path)
    found = Round.read(tmp_path, 3, "this")
    assert found is not None
    assert found.slots == slots
    assert torch.equal(found.latents, made.latents)
    assert torch.equal(found.cost, made.cost)
    assert Round.read(tmp_path, 3, "another run") is None
    assert Round.read(tmp_path, 4, "this") is None
    file = round_file(tmp_path, 3)
    file.write_bytes(file.read_bytes()[:-8])
    assert Round.read(tmp_path, 3, "this") is None


def test_weights_are_distinguished_by_every_bit() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert weights_digest(weights) == weights_digest(dict(reversed(weights.items())))
    assert weights_digest({**weights, "b": torch.tensor([1.0, 1.0 + 2**-23])}) != weights_digest(weights)
