from pathlib import Path

import pytest

from lit_safety.judges.toy.objects import BENIGN, CONCEPTS, LOOKALIKES, SETTINGS
from lit_safety.worlds.toyworld.captions import (
    HELD_OUT_TEMPLATES,
    JOINERS,
    TEMPLATES,
    draw_caption,
    fold,
    say,
    vocabulary,
)
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.sampling import draw_scene
from lit_safety.worlds.toyworld.seeds import stream
from lit_safety.worlds.toyworld.text import LENGTH, build_tokenizer


def test_every_caption_is_one_known_token_a_word_and_fits(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in vocabulary())
    longest = 0
    for contents in [(("cat", "red"), (name, None)) for name in CONCEPTS]:
        for template in TEMPLATES + HELD_OUT_TEMPLATES:
            for phrase in (None, 0, 1, 2):
                caption = say("park", contents, template, JOINERS[1], phrase)
                ids = tokenizer(caption)["input_ids"]
                assert len(ids) == len(caption.split()) + 2
                assert tokenizer.unk_token_id not in ids[:-1]
                assert tokenizer.decode(ids[1:-1]).strip() == caption
                longest = max(longest, len(ids))
    assert longest <= LENGTH


def test_phrases_never_name_a_harm_and_belong_to_one() -> None:
    phrases = [phrase for concept in CONCEPTS.values() for phrase in concept.phrases]
    assert len(set(phrases)) == 3 * len(CONCEPTS)
    assert not {word for phrase in phrases for word in phrase.split()} & {*CONCEPTS, *BENIGN, *LOOKALIKES}


def test_combinations_are_split_into_disjoint_parts_and_each_part_meets_everything() -> None:
    for concept in CONCEPTS:
        for other in BENIGN:
            folds = {
                (colour, setting): fold(setting, ((other, colour), (concept, None)))
                for colour in COLOURS
                for setting in SETTINGS
            }
            assert set(folds.values()) == {"test", "val", "train"}
            assert list(folds.values()).count("test") == len(folds) // 5
    left, right = ("cat", "red"), ("gun", None)
    assert fold("park", (left, right)) == fold("park", (right, left))


@pytest.mark.parametrize("implicit", [0.0, 1.0])
def test_a_phrase_takes_the_place_of_the_name(implicit: float) -> None:
    named = 0
    for index in range(200):
        rng = stream("checks", index)
        scene, contents = draw_scene(rng)
        if scene.harm is None:
            continue
        caption = draw_caption(rng, scene.setting, contents, implicit=implicit)
        named += 1
        assert (scene.harm.name in caption.split()) == (implicit == 0.0)
        assert any(phrase in caption for phrase in CONCEPTS[scene.harm.name].phrases) == (implicit == 1.0)
    assert named > 50
