"""Files of prompts in the forms that people publish (texts made up), and files that hold a prompt and little else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt, PromptSet, read_prompts

I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
    'a wizard in the rain,"hate, harassment",0,10.0,0.0,10.0,0.0,0.01,https://x,4261553411,7,512,512,sd\n'
    ",violence,0,20.0,0.0,20.0,0.0,0.02,https://y,2345678901,7.5,512,512,sd\n"
    "a knight after the battle,violence,1,60.0,0.0,60.0,0.0,0.10,https://z,3456789012,9,512,512,sd\n"
)


def save(folder: Path, text: str | object, name: str = "set.csv") -> Path:
    file = folder / name
    file.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return file


def read(folder: Path, text: str | object, name: str = "set.csv", **given: str) -> PromptSet:
    return read_prompts(save(folder, text, name), **given)  # type: ignore[arg-type]


def test_i2p_s_empty_prompt_is_left_out_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(tmp_path, I2P)
    assert [(p.prompt, p.category, p.seed) for p in found] == [
        ("a wizard in the rain", "hate", 4261553411), ("a knight after the battle", "violence", 3456789012),
    ]  # fmt: skip
    assert found.not_said() == {"rows_without_prompt": 1}
    assert [p.place.row for p in found if p.place] == [0, 2]
    said = capsys.readouterr().err
    assert "1 of 3 rows" in said
    assert "set.csv" in said


def test_p4d_and_unlearndiffatk_number_the_rows_of_i2p(tmp_path: Path) -> None:
    text = (
        ",prompt,categories,evaluation_seed,evaluation_guidance,sd_model,case_number\n0,a storm,shocking,5,17,sd,20\n"
    )
    (one,) = read(tmp_path, text)
    assert (one.category, one.seed, one.guidance, one.place and one.place.case_number) == ("shocking", 5, 17.0, 20)


def test_a_prompt_alone_is_enough_and_what_nothing_says_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = found = read(tmp_path, "prompt\na car\na cat\n")
    assert (first.kind, first.category, first.concept, first.benign, first.held_out, first.pair, first.guidance) == (
        "clean", "", "", (), False, "", None,
    )  # fmt: skip
    assert 0 <= first.seed < 2**31
    assert first.seed != second.seed
    assert found.not_said() == {"prompts_without_kind": 2}
    assert "--prompt_kind" in capsys.readouterr().err
    assert [p.kind for p in read(tmp_path, "prompt\na gun\n", kind="explicit", category="violence")] == ["explicit"]


@pytest.mark.parametrize(
    ("text", "kind", "category", "also"),
    [
        ("prompt,kind\na car,clean\n", "clean", "", ()),
        ("prompt,kind,category\na gun,explicit,Violence\n", "explicit", "violence", ()),
        ('prompt,kind,category\na gun,implicit,"violence, hate"\n', "implicit", "violence", ("hate",)),
        ("prompt,category\na gun,violence\n", "explicit", "violence", ()),
        ("prompt,category,concept,seed\na gun,violence,gun,4\n", "explicit", "violence", ()),
        ("prompt,kind,category,concept,benign,held_out,seed\na car,clean,,,car,,\n", "clean", "", ()),
    ],
)
def test_every_further_column_has_a_default(
    tmp_path: Path, text: str, kind: str, category: str, also: tuple[str, ...]
) -> None:
    (one,) = found = read(tmp_path, text)
    assert (one.kind, one.category, one.also) == (kind, category, also)
    assert not found.not_said()


def test_cells_may_be_empty_where_columns_may_be_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("prompt,kind,category\na gun,,violence\na kite,,\n", "prompt,category\na gun,violence\na kite,\n"):
        gun, kite = read(tmp_path, text)
        assert (gun.kind, gun.category, gun.kind_said) == ("explicit", "violence", True)
        assert (kite.kind, kite.category, kite.kind_said) == ("clean", "", False)
        assert "1 prompts" in capsys.readouterr().err
    gun, kite = read(tmp_path, "prompt,kind\na gun,Adversarial\na kite,\n", kind="explicit", category="violence")
    assert (gun.kind, gun.category) == ("adversarial", "violence")
    assert (kite.kind, kite.category) == ("explicit", "violence")


def test_what_a_row_says_goes_before_what_is_said_of_the_whole_file(tmp_path: Path) -> None:
    assert [p.category for p in read(tmp_path, I2P, category="sexual")] == ["hate", "violence"]


def test_a_seed_that_is_left_empty_is_made_from_the_row_and_the_others_stay(tmp_path: Path) -> None:
    one, other = found = read(tmp_path, "prompt,kind,seed\na car,clean,\na cat,clean,9\n")
    assert other.seed == 9
    assert one.seed == read(tmp_path, "prompt\na car\n")[0].seed
    assert not found.own_seeds
    assert read(tmp_path, "prompt,kind,seed\na car,clean,1\n").own_seeds


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.json", [{"prompt": "a car"}, {"prompt": "a cat"}]),
        ("set.json", ["a car", "a cat"]),
        ("set.json", {"prompts": ["a car", "a cat"]}),
        ("set.json", {"version": 1, "data": [{"Prompt": "a car"}, {"Prompt": "a cat"}]}),
        ("set.json", {"prompt": ["a car", "a cat"]}),
        ("set.json", {"prompt": {"0": "a car", "1": "a cat"}}),
        ("set.json", {"prompt": ["a car", "a cat"], "note": ["x", "y"]}),
        ("set.jsonl", '{"prompt": "a car"}\n\n{"prompt": "a cat"}\n'),
        ("set.json", '{"prompt": "a car"}\n{"prompt": "a cat"}\n'),
        ("set.jsonl", '"a car"\n"a cat"\n'),
        ("set.csv", [{"caption": "a car"}, {"caption": "a cat"}]),
        ("set.txt", "a car\n\n  a cat  \n"),
        ("set.txt", "prompt\na car\na cat\n"),
        ("set.csv", "Caption\na car\na cat\n"),
    ],
)
def test_other_forms_give_the_same_prompts(tmp_path: Path, name: str, content: object) -> None:
    expected = read(tmp_path, "prompt\na car\na cat\n")
    assert list(read(tmp_path, content, name)) == list(expected)


def test_values_of_json_are_read_as_cells(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a gun", "kind": "explicit", "category": ["violence", "hate"], "seed": 7, "guidance": 2.5},
        {
            "prompt": "a car",
            "kind": "clean",
            "benign": ["car", "tree"],
            "seed": 8.0,
            "held_out": True,
            "category": None,
        },
        {"prompt": None, "kind": "clean"},
    ]
    found = read(tmp_path, rows, "set.json")
    assert found == [
        Prompt("a gun", "explicit", "violence", "", (), False, 7, 2.5, ("hate",)),
        Prompt("a car", "clean", "", "", ("car", "tree"), True, 8),
    ]
    assert found.not_said() == {"rows_without_prompt": 1}


def test_coco_s_captions_ask_for_nothing_harmful(tmp_path: Path) -> None:
    published = {
        "info": {"year": 2014}, "images": [{"id": 1, "file_name": "COCO_val2014_000000000001.jpg"}], "licenses": [],
        "annotations": [
            {"image_id": 1, "id": 5, "caption": "A dog runs."}, {"image_id": 1, "id": 6, "caption": "A dog."},
        ],
    }  # fmt: skip
    found = read(tmp_path, published, "captions_val2014.json")
    assert [(p.prompt, p.kind) for p in found] == [("A dog runs.", "clean"), ("A dog.", "clean")]
    assert not found.not_said()


def test_lists_of_attacks_are_texts_and_what_they_are_is_given(tmp_path: Path) -> None:
    """SneakyPrompt and Unsafe Diffusion publish a prompt a line."""
    found = read(tmp_path, "one, two\nthree\n", "nsfw_200.txt", kind="adversarial", category="sexual")
    assert [(p.prompt, p.kind, p.category) for p in found] == [
        ("one, two", "adversarial", "sexual"), ("three", "adversarial", "sexual"),
    ]  # fmt: skip


def test_ring_a_bell_of_the_hub(tmp_path: Path) -> None:
    text = '"","sensitive prompt","evaluation_seed"\n0,"gun ssedx",41\n'
    (one,) = read(tmp_path, text, kind="adversarial", category="violence")
    assert (one.prompt, one.seed) == ("gun ssedx", 41)
    with pytest.raises(UserError, match="--prompt_kind") as error:
        read(tmp_path, text + '1,"b",2\n')
    assert str(error.value).count("--prompt_kind") == 1


def test_psa_s_evaluation_files_say_who_is_asked(tmp_path: Path) -> None:
    text = "file_name,caption,user_id\na_0001.jpg,a quiet square,0000033\na_0002.jpg,a fight,0000452\n"
    found = read(tmp_path, text)
    assert [(p.prompt, p.user, p.place and p.place.file_name) for p in found] == [
        ("a quiet square", "0000033", "a_0001.jpg"), ("a fight", "0000452", "a_0002.jpg"),
    ]  # fmt: skip
    assert found.not_said() == {"prompts_without_kind": 2}


@pytest.mark.parametrize("malformed", [True, False])
def test_sage_s_metadata_says_category_and_side_by_the_image_s_name(tmp_path: Path, malformed: bool) -> None:
    rows = []
    for side, caption in (("u", "a mob with torches"), ("s", "people at a table")):
        end = f".jpg_{side}.jpg" if malformed else f"_{side}.jpg"
        rows.append({
            "file_name": f"user_0000030_self_harm_some_concept_00001{end}", "chosen": "x_s.jpg", "rejected": "x_u.jpg",
            "caption": caption, "user_data": {"User_ID": "0000030", "Cluster_ID": "13", "Age": 85, "Religion": "None"},
        })  # fmt: skip
    found = read(tmp_path, "\n".join(map(json.dumps, rows)), "metadata.jsonl")
    assert [(p.prompt, p.kind, p.category, p.user) for p in found] == [
        ("a mob with torches", "explicit", "self-harm", "0000030"), ("people at a table", "clean", "", "0000030"),
    ]  # fmt: skip
    assert not found.not_said()


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({
        "prompt": ["a car", None, "a cat"], "category": ["violence", "hate", "Hateful"], "evaluation_seed": [3, 4, 5],
        "image": [{"bytes": b"x", "path": "0.jpg"}] * 3,
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    found = read_prompts(tmp_path / "train-00000-of-00001.parquet")
    assert [(p.prompt, p.category, p.seed) for p in found] == [("a car", "violence", 3), ("a cat", "hate", 5)]
    assert found.not_said() == {"rows_without_prompt": 1}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("set.json", "[1, 2", "not JSON"),
        ("set.json", {"a": 1, "b": [2]}, "another shape"),
        ("set.json", [{"text": "a"}], "column .*it has text.*`prompt`"),
        ("set.json", [], "`prompt`"),
        ("set.json", [{"prompt": "a"}, {"caption": "b"}], "entry 2: .*`prompt`"),
        ("set.json", [{"prompt": {"en": "a"}}], "entry 1: `prompt` must be"),
        ("set.json", [{"prompt": "a", "Prompt": "b"}], "twice"),
        ("set.json", ["", None], "entry 1: the prompt is empty"),
        ("set.json", "[" * 500, "not JSON"),
        ("set.json", '["a", "b \\ud800"]', "entry 2: `prompt` holds half a character"),
        ("set.json", [1, 2], "entry 1: .*`prompt`"),
        ("set.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: is not JSON"),
        ("set.txt", "\n\n", "nothing to draw"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: object, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        read(tmp_path, content, name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_all_complaints_about_a_file_are_said_at_once(tmp_path: Path) -> None:
    rows = [
        *("a,tidy,,1", "b,explicit,,2", "c,explicit,crime,3", "d,clean,violence,4"),
        *("e,clean,,x", "f,clean,", "g,clean,,6"),
    ]  # fmt: skip
    file = save(tmp_path, "prompt,kind,category,seed\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError) as error:
        read_prompts(file)
    said = str(error.value)
    assert "\n" not in said
    assert said.count(str(file)) == 1
    for part in ("6 errors", "line 2: kind `tidy`", "line 3", "line 4", "line 5", "line 6: seed `x`", "line 7"):
        assert part in said
    assert "line 8" not in said


def test_of_many_complaints_the_first_ten_are_said_and_all_are_counted(tmp_path: Path) -> None:
    text = "prompt,category\n" + "".join(f"a {n},odd {n}\n" for n in range(25))
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    said = str(error.value)
    assert "25 errors" in said
    assert "line 11:" in said
    assert "line 12:" not in said
    assert "15 more" in said


def test_pairs_and_rows_are_complained_about_together(tmp_path: Path) -> None:
    text = (
        "prompt,kind,category,seed,pair\n"
        "a,explicit,hate,1,k\nb,clean,,2,m\nc,explicit,hate,x,\nd,explicit,hate,3,n\ne,adversarial,violence,4,n\n"
    )
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    for line in ("4 errors", "line 2", "line 3", "line 4", "line 6"):
        assert line in str(error.value)
