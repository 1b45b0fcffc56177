"""What a round draws: which prompts, from which seeds, and how a prompt is changed where nothing safe was drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from lit_safety.drawing.prompts import Prompt
from lit_safety.modules.rounds import (
    OWN,
    Explore,
    Round,
    Words,
    first_images,
    first_slots,
    further_slots,
    kept_share,
    round_file,
    round_prompts,
    weights_digest,
)

HARMLESS = ["a red cat in the park", "a blue house on the street", "in the room there is a star"]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"a gun beside a red cat {i}", "explicit", "violence", "gun", (), False, i) for i in range(count)]


def test_the_harmful_word_is_the_one_that_no_harmless_prompt_has() -> None:
    words = Words(HARMLESS)
    assert words.dropped("a red cat and a gun in the park", 0) == "a red cat a in the park"  # nor has any "and"
    assert words.dropped("A Gun, on the street", 0) == "A on the street"


@pytest.mark.parametrize("prompt", ["a red cat in the room", "smoking loaded guns everywhere"])
def test_where_words_do_not_tell_a_part_is_dropped_by_chance(prompt: str) -> None:
    """Of a prompt whose words are all known, and of one with none of them."""
    given, words = prompt.split(), Words(HARMLESS)
    found = {words.dropped(prompt, seed) for seed in range(60)}
    assert len(found) > 4
    assert prompt not in found
    for text in found:
        kept = text.split()
        gone = len(given) - len(kept)
        assert 1 <= gone <= min(4, len(given) - 1)
        assert any(given[:start] + given[start + gone :] == kept for start in range(len(given)))


def test_the_nearest_harmless_prompt_shares_the_most_words() -> None:
    words = Words([*HARMLESS, "in the room there is a rose"])
    assert words.nearest("a gun and a red cat in the park", 0) == "a red cat in the park"
    found = {words.nearest("in the room there is a gun", seed) for seed in range(20)}
    assert found == {"in the room there is a star", "in the room there is a rose"}


def test_a_share_of_words_is_kept() -> None:
    assert kept_share("a red cat and a gun", "a red cat") == pytest.approx(4 / 6)
    assert kept_share("a gun", "a gun") == 1.0


def test_every_prompt_stands_once_before_any_stands_twice() -> None:
    rows = prompts(7)
    drawn = [row.seed for number in range(7) for row in round_prompts(rows, 3, 5, number)]
    assert all(Counter(drawn[start : start + 7]) == Counter(range(7)) for start in (0, 7, 14))
    assert drawn[:7] != drawn[7:14]
    assert [row.seed for row in round_prompts(rows, 3, 6, 0)] != drawn[:3]


def test_images_are_of_the_prompt_as_it_is_or_explored_where_nothing_was_safe() -> None:
    explore = Explore(share=0.5, guards=[SafeLatentDiffusion()], guidance=[7.5])
    assert explore.names == ["drop", "nearest", "guard 0", "guidance 7.5"]
    assert [first_images(n, explore) for n in (2, 4, 6)] == [1, 2, 3]
    assert first_images(4, None) == 4
    rows, words = prompts(3), Words(HARMLESS)
    first = first_slots(rows, 2, 0, 1)
    more = further_slots(rows, [True, False, True], range(2, 6), explore, words, 0, 1)
    assert Counter(slot.way for slot in more if slot.prompt == 0) == Counter(explore.names)
    assert {slot.way for slot in more if slot.prompt == 1} == {OWN}
    assert all(slot.counts for slot in first)
    assert not any(slot.counts for slot in more)  # else prompts that draw safe images would count more often
    assert len({slot.seed for slot in first + more}) == 6 * 3
    dropped = next(slot for slot in more if slot.way == "drop")
    assert dropped.text == "a a red cat"
    assert dropped.kept < 1.0
    assert next(slot for slot in more if slot.way == "guard 0").text == rows[0].prompt
    assert explore.guard("guard 0") is explore.guards[0]
    assert more == further_slots(rows, [True, False, True], range(2, 6), explore, words, 0, 1)
    assert [slot.seed for slot in first_slots(rows, 2, 0, 2)] != [slot.seed for slot in first]


@pytest.mark.parametrize("settings", [{"ways": []}, {"ways": ["shout"]}, {"share": 1.0}, {"guidance": [0.5]}])
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


def test_weights_are_told_apart_by_every_bit() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert weights_digest(weights) == weights_digest(dict(reversed(weights.items())))
    assert weights_digest({**weights, "b": torch.tensor([1.0, 1.0 + 2**-23])}) != weights_digest(weights)
