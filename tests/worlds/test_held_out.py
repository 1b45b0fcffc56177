"""Held-out things are in no file that alignment or selection sees, under any name."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.format.writer import ShardWriter
from lit_safety.worlds.held_out import HeldOut, check_held_out
from lit_safety.worlds.toyworld.captions import U_TEST, U_VAL, held_out
from tests.helpers.documents import TOYWORLD

APPLE = HeldOut({"red-apple": ("pomme", "Big Apple"), "fir": ()}, (("violence", "on the beach"),))


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("a Red Apple on a table", "red-apple"),
        ("two red_apples", "red-apple"),
        ("une pomme, please", "red-apple"),
        ("the big\tapple", "red-apple"),
        ("some firs", "fir"),
    ],
)
def test_a_subject_is_found_by_name_synonym_and_plural(text: str, subject: str) -> None:
    found = APPLE.found_in(text)
    assert found is not None
    assert subject in found


@pytest.mark.parametrize("text", ["an apple", "the first fire", "confirm", "pommel", "a gun in the park", ""])
def test_part_of_a_word_is_no_subject(text: str) -> None:
    assert APPLE.found_in(text) is None


def test_a_scene_is_a_category_with_its_words() -> None:
    assert APPLE.found_in("a gun on the beach", ["violence"]) is not None
    assert APPLE.found_in("a gun on the beach", ["hate"]) is None
    assert APPLE.found_in("a gun in the park", ["violence"]) is None


def shards(folder: Path, prompt: str, **more: object) -> Path:
    image = Image.new("RGB", (8, 8))
    sample = {"prompt_kind": "harmful", "order": "safety", "harmful": {"chosen": False, "rejected": True}}
    with ShardWriter(folder, provenance={"source": "test"}) as writer:
        writer.write("a", {"prompt": "a gun in the park", **sample}, image, image)
        writer.write("b", {"prompt": prompt, **sample, **more}, image, image)
    return folder


def test_shards_are_read_whole(tmp_path: Path) -> None:
    check_held_out(APPLE, [shards(tmp_path / "good", "an apple")])
    for name, prompt, more in (
        ("prompt", "a red apple", {}),
        ("concept", "an apple", {"categories": ["violence"], "concept": "fir"}),
        ("scene", "a knife on the beach", {"categories": ["Violence"]}),
    ):
        folder = shards(tmp_path / name, prompt, **more)
        with pytest.raises(UserError, match="'b'") as refused:
            check_held_out(APPLE, [tmp_path / "good", folder])
        assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.csv", "prompt,kind,category\na car,clean,\n\"a fir, green\",clean,\n"),
        ("concept.csv", "prompt,kind,benign\na car,clean,car\nsomething green,clean,car;fir\n"),
        ("scene.csv", "prompt,category\na gun on the street,violence\na gun on the beach,Violence\n"),
        ("anchors.txt", "a car\na fir\n"),
        ("anchors.jsonl", json.dumps({"prompt": "a car"}) + "\n" + json.dumps({"prompt": "a fir"}) + "\n"),
    ],
)  # fmt: skip
def test_a_file_is_refused_by_its_line(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError) as refused:
        check_held_out(APPLE, [file])
    lines = content.splitlines()
    assert f"{file} line {len(lines)}" in str(refused.value)
    file.write_text("\n".join(lines[:-1]) + "\n")
    check_held_out(APPLE, [file])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv"):
        check_held_out(APPLE, [tmp_path / "none.csv"])


@pytest.mark.parametrize("name", ["train", "val", "conflict", "onpolicy"])
def test_shipped_pairs_show_nothing_that_is_held_out(name: str) -> None:
    check_held_out(held_out(), [TOYWORLD / "shards" / name])


def test_shipped_validation_prompts_ask_for_u_val_and_for_nothing_of_u_test() -> None:
    check_held_out(held_out(U_TEST), [TOYWORLD / "prompts" / "val.csv"])
    for subject in U_VAL:
        with pytest.raises(UserError, match=subject):
            check_held_out(held_out((subject,)), [TOYWORLD / "prompts" / "val.csv"])


@pytest.mark.parametrize("file", ["shards/test", "shards/cost_model", "prompts/test.csv"])
@pytest.mark.parametrize("subject", U_TEST)
def test_what_measures_and_the_cost_model_know_every_subject(file: str, subject: str) -> None:
    with pytest.raises(UserError, match=subject):
        check_held_out(HeldOut({subject: ()}), [TOYWORLD / file])
