from pathlib import Path

import numpy as np
import pytest

from lit_safety.judges.toy.objects import CONCEPTS, LOOKALIKES
from lit_safety.worlds.toyworld.captions import say
from lit_safety.worlds.toyworld.clip import (
    CHANGES,
    FAMILY,
    Change,
    Meaning,
    draw_family,
    exchange,
    make_families,
    possible,
)
from lit_safety.worlds.toyworld.text import build_tokenizer

HARMFUL = Meaning("park", (("cat", "red"), ("gun", None)))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_exchanges_one_thing_and_nothing_else(change: Change) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        setting, contents = exchange(rng, HARMFUL, change)
        assert (setting == "park") == (change != "setting")
        if change == "order":
            assert contents == HARMFUL.contents[::-1]
        elif change == "missing":
            assert len(contents) == 1
            assert contents[0] in HARMFUL.contents
        elif change == "setting":
            assert contents == HARMFUL.contents
        elif change == "lookalike":
            assert contents == (("cat", "red"), ("dryer", None))
        elif change == "colour":
            assert contents[0][0] == "cat"
            assert contents[0][1] != "red"
            assert contents[1] == ("gun", None)
        else:
            same = [before == after for before, after in zip(HARMFUL.contents, contents, strict=True)]
            assert same.count(False) == 1
            assert [colour for _, colour in contents] == ["red", None]
            assert contents[1][0] in CONCEPTS
            assert contents[0][0] not in CONCEPTS


def test_only_what_a_scene_holds_can_be_exchanged() -> None:
    assert set(possible(HARMFUL)) == set(CHANGES)
    assert set(possible(Meaning("room", (("gun", None),)))) == {"object", "lookalike", "setting"}
    assert set(possible(Meaning("room", (("cat", "red"),)))) == {"object", "colour", "setting"}
    rng = np.random.default_rng(1)
    for _ in range(10):
        _, ((name, _),) = exchange(rng, Meaning("room", (("candle", None),)), "lookalike")
        assert CONCEPTS[name].lookalike == "candle"
        _, ((name, _),) = exchange(rng, Meaning("room", (("candle", None),)), "object")
        assert name in LOOKALIKES


def test_a_family_holds_scenes_of_different_captions_that_share_most() -> None:
    for index in range(20):
        family = draw_family("checks", index)
        meanings = [meaning for _, _, meaning in family]
        assert len(set(meanings)) == FAMILY == len({say(*meaning) for meaning in meanings})
        first = {*meanings[0].contents, meanings[0].setting}
        assert all(first & {*other.contents, other.setting} for other in meanings[1:])
        assert len({image.tobytes() for image, _, _ in family}) == FAMILY


def test_families_are_kept_as_images_tokens_and_meanings(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    make_families(tmp_path, tokenizer, 3, workers=1)
    images, data = np.load(tmp_path / "clip_pictures.npy"), np.load(tmp_path / "clip_captions.npz")
    image, captions, _ = draw_family("clip", 2)[1]
    assert np.array_equal(images[2, 1], image)
    said = tokenizer.batch_decode(data["ids"][2, 1], skip_special_tokens=True)
    assert [text.strip() for text in said] == captions
    assert data["meanings"].shape == (3, FAMILY, 5)
    assert not list(tmp_path.glob("*.part*"))
