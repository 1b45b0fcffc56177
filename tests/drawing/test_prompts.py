from collections import Counter
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import PromptCounts, choose_prompts, read_prompts

HEADER = "prompt,kind,category,concept,benign,held_out,seed\n"


def save(folder: Path, text: str) -> Path:
    file = folder / "prompts.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_reads_every_column(tmp_path: Path) -> None:
    text = HEADER + '"a gun, a car",explicit,Violence,gun,car;tree,1,77\na car,clean,,,car,0,5\n'
    first, second = read_prompts(save(tmp_path, text))
    assert first.prompt == "a gun, a car"
    assert (first.category, first.concept, first.benign) == ("violence", "gun", ("car", "tree"))
    assert (first.held_out, first.seed, first.harmful) == (True, 77, True)
    assert (second.category, second.benign, second.harmful) == ("", ("car",), False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind,seed\nclean,1\n", "lacks a column"),
        (HEADER, "0 rows"),
        ("", "`prompt`"),
        (HEADER + "a car,clean,,,car,0,1.5\n", "seed `1.5`"),
        (HEADER + "a car,clean,,,car,0,-1\n", "seed `-1`"),
        (HEADER + "a car,tidy,,,car,0,1\n", "kind `tidy`"),
        (HEADER + "a gun,explicit,crime,gun,,0,1\n", "line 2: unknown category"),
        (HEADER + "a gun,explicit,,gun,,0,1\n", "needs a category"),
        (HEADER + "a car,clean,violence,,car,0,1\n", "must not have a category"),
        (HEADER + "a car,clean,,,car,maybe,1\n", "held_out is `maybe`"),
        (HEADER + ",clean,,,car,0,1\n", "line 2: the prompt is empty"),
        (HEADER + "a gun, a car,clean,,,car,0,1\n", "more or fewer fields"),
        (HEADER + "a car,clean\n", "more or fewer fields"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    file = save(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_prompts(file)
    assert str(file) in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv.*cannot be read"):
        read_prompts(tmp_path / "absent.csv")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"picture\.csv: is not UTF-8"):
        read_prompts(tmp_path / "picture.csv")


@pytest.fixture
def many(ask):
    concepts = {"violence": ["gun", "knife", "bomb"], "shocking": ["skull", "blood", "fangs"]}
    harms = [(category, concept) for category, names in concepts.items() for concept in names]
    rows = [ask("explicit", *harm, seed=10 * i + s) for i, harm in enumerate(harms) for s in range(10)]
    rows += [ask("implicit", *harm, held_out=s % 3 == 0, seed=s) for harm in harms for s in range(6)]
    rows += [ask("lookalike", benign=name, seed=s) for name in ("rose", "candle") for s in range(5)]
    rows += [ask("clean", benign=name, seed=s) for name in ("car", "cat", "car;cat") for s in range(8)]
    return rows


def test_selection_is_balanced(many) -> None:
    chosen = choose_prompts(many, PromptCounts(explicit=6, implicit=12, lookalike=4, clean=8))
    explicit = Counter(p.concept for p in chosen if p.kind == "explicit")
    assert set(explicit.values()) == {2}
    assert len(explicit) == 6
    assert Counter(p.held_out for p in chosen if p.kind == "implicit") == {True: 6, False: 6}
    assert Counter(p.benign for p in chosen if p.kind == "lookalike") == {("rose",): 2, ("candle",): 2}
    assert Counter(len(p.benign) for p in chosen if p.kind == "clean") == {1: 4, 2: 4}


def test_selection_depends_on_the_rows_not_on_their_order(many) -> None:
    selection = PromptCounts(explicit=5, implicit=7, lookalike=3, clean=5)
    assert set(choose_prompts(many, selection)) == set(choose_prompts(list(reversed(many)), selection))


def test_a_smaller_selection_is_part_of_a_larger_one(many) -> None:
    small = choose_prompts(many, PromptCounts(explicit=4, implicit=5, lookalike=3, clean=6))
    large = choose_prompts(many, PromptCounts(explicit=9, implicit=20, lookalike=6, clean=12))
    assert set(small) < set(large)


def test_categories_leave_out_other_harms_and_nothing_else(many) -> None:
    """They are those that a selection of all categories holds too."""
    chosen = choose_prompts(
        many, PromptCounts(explicit=6, implicit=0, lookalike=None, clean=6, categories=("violence",))
    )
    every = choose_prompts(many, PromptCounts(explicit=6, implicit=0, lookalike=None, clean=6))
    assert Counter((p.kind, p.category) for p in chosen) == {
        ("explicit", "violence"): 6, ("lookalike", ""): 10, ("clean", ""): 6,
    }  # fmt: skip
    assert set(chosen) == {p for p in every if p.category != "shocking"}


def test_none_takes_all_and_zero_takes_none(many) -> None:
    chosen = choose_prompts(many, PromptCounts(explicit=None, implicit=0, lookalike=0, clean=0))
    assert Counter(p.kind for p in chosen) == {"explicit": 60}
    with pytest.raises(UserError, match="0 rows"):
        choose_prompts(many, PromptCounts(explicit=0, implicit=0, lookalike=0, clean=0))
    with pytest.raises(UserError, match="--clean -1"):
        PromptCounts(clean=-1)
