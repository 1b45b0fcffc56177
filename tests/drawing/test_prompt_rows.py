"""Every row of a prompt file is drawn, or the file is refused: pairs, repeated columns, ragged rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.core.tables import csv_lines, read_csv
from lit_safety.drawing.prompts import COLUMNS, PromptCounts, choose_prompts, read_prompts
from lit_safety.merging.calibration import calibration_prompts
from lit_safety.users.profiles import read_profiles, write_profiles

HEADER = [*COLUMNS, "guidance", "pair"]
PROFILE = "7,18-25,Man,None,Fine,Fine,['Hate'],['Violence']"
PROFILE_HEADER = (
    "Age,Age_Group,Gender,Religion,Physical_Condition,Mental_Condition,Banned_Categories,Allowed_Categories"
)


def row(prompt: str, kind: str, pair: str, category: str = "hate", seed: int = 1) -> list[object]:
    return [prompt, kind, category if kind not in ("clean", "lookalike") else "", "", "", "", seed, "", pair]


def save(folder: Path, rows: list[list[object]], header: list[str] | None = None) -> Path:
    file = folder / "set.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header or HEADER, *rows])
    return file


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("a", "explicit", "k")], ["line 2"]),
        ([row("a", "explicit", "k"), row("b", "adversarial", "l")], ["line 2"]),
        ([row("a", "explicit", "k"), row("b", "explicit", "k", seed=2), row("c", "adversarial", "k")],
         ["line 3", "line 2", "`k`"]),
        ([row("a", "implicit", "k"), row("c", "adversarial", "k")], ["line 2", "implicit"]),
        ([row("a", "clean", "k"), row("c", "adversarial", "k")], ["line 2", "clean"]),
        ([row("a", "lookalike", "k")], ["line 2", "lookalike"]),
        ([row("a", "explicit", "k"), row("c", "adversarial", "k", "violence")], ["line 3", "violence", "hate"]),
    ],
)  # fmt: skip
def test_a_pair_that_would_lose_rows_is_refused(tmp_path: Path, rows: list[list[object]], says: list[str]) -> None:
    file = save(tmp_path, rows)
    with pytest.raises(UserError) as error:
        read_prompts(file)
    assert "\n" not in str(error.value)
    for text in (str(file), *says):
        assert text in str(error.value)


def test_every_row_of_good_pairs_is_drawn_once(tmp_path: Path) -> None:
    """Two adversarial texts of one prompt, and one of another."""
    rows = [row("a", "explicit", "k"), row("a1", "adversarial", "k"), row("a2", "adversarial", "k"),
            row("b", "explicit", "l"), row("b1", "adversarial", "l"), row("c", "explicit", "")]  # fmt: skip
    chosen = choose_prompts(read_prompts(save(tmp_path, rows)), PromptCounts())
    assert sorted(p.prompt for p in chosen) == ["a", "a1", "a2", "b", "b1", "c"]


def test_an_adversarial_row_without_its_prompt_is_drawn_and_reported(tmp_path: Path, capsys) -> None:
    file = save(tmp_path, [row("a1", "adversarial", "k"), row("a2", "adversarial", "m")])
    assert len(choose_prompts(read_prompts(file), PromptCounts())) == 2
    assert f"{file} line 2" in capsys.readouterr().err


@pytest.mark.parametrize("twice", ["seed", "Seed", " seed ", "PAIR", "guidance"])
def test_a_column_that_occurs_twice_is_refused(tmp_path: Path, twice: str) -> None:
    file = save(tmp_path, [[*row("a", "clean", ""), "9"]], [*HEADER, twice])
    with pytest.raises(UserError) as error:
        read_prompts(file)
    assert str(file) in str(error.value)
    assert twice.strip() in str(error.value)


def test_a_published_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, [["a", "hate", "violence"]], ["prompt", "category", "Category"])
    with pytest.raises(UserError, match="category"):
        read_prompts(file)


def test_columns_are_known_whatever_their_case_and_blanks(tmp_path: Path) -> None:
    header = ["Prompt", " KIND", "category", "concept", "benign", "Held_Out", "seed ", "Guidance", " pair"]
    (one,) = read_prompts(save(tmp_path, [["a", "clean", "", "", "", "", 3, "2.5", ""]], header))
    assert (one.prompt, one.seed, one.guidance) == ("a", 3, 2.5)


def test_columns_without_a_name_are_no_columns_that_stand_twice(tmp_path: Path) -> None:
    assert len(read_prompts(save(tmp_path, [[*row("a", "clean", ""), "", ""]], [*HEADER, "", ""]))) == 1


@pytest.mark.parametrize("cells", [["a", "hate", "x"], ["a"]])
def test_ragged_rows_are_refused_by_every_reader(tmp_path: Path, cells: list[str]) -> None:
    file = save(tmp_path, [cells], ["prompt", "category"])
    for read in (
        lambda: read_prompts(file), lambda: read_csv(str(file), ["prompt"]),
        lambda: calibration_prompts(str(file), 1),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"set\.csv"):
            read()


def test_other_tables_with_a_column_twice(tmp_path: Path) -> None:
    file = save(tmp_path, [["a", "hate", "b"]], ["prompt", "category", "Prompt "])
    for read in (lambda: read_csv(str(file), ["prompt"]), lambda: calibration_prompts(str(file), 1)):
        with pytest.raises(UserError, match=r"set\.csv.*[Pp]rompt"):
            read()


def test_a_users_table_whose_id_column_is_spelt_otherwise_keeps_its_ids(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text(f"user_id,{PROFILE_HEADER},split\nmary,{PROFILE},train\n")
    (tmp_path / "users.csv").write_text((tmp_path / "users.csv").read_text().replace("[", '"[').replace("]", ']"'))
    assert read_profiles(tmp_path)["mary"].split == "train"


def test_cells_that_a_spreadsheet_would_run_are_escaped_and_come_back(tmp_path: Path) -> None:
    texts = ["=1+1", "+cmd", "-x", "@sum", "\tx", "\rx", "'=quoted", "''+twice", "plain", "'plain", "-1.5", "a=b", ""]
    file = tmp_path / "out.csv"
    file.write_bytes(csv_lines([["text"], *([text] for text in texts)]).encode())
    with file.open(newline="") as stream:
        written = [line[0] if line else "" for line in csv.reader(stream)][1:]
    assert all(cell[:1] not in ("=", "+", "-", "@", "\t", "\r") for cell in written if cell != "-1.5")
    assert [found["text"] for found in read_csv(str(file), ["text"])] == texts


def test_users_and_prompts_with_such_cells_round_trip(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text(
        f"User_ID,{PROFILE_HEADER}\n-anna-,{PROFILE}\n".replace("[", '"[').replace("]", ']"')
    )
    users = read_profiles(tmp_path)
    again = write_profiles(tmp_path / "again.csv", users.values())
    assert "\n'-anna-," in again.read_text()
    assert read_profiles(again) == users
    file = tmp_path / "prompts.csv"
    file.write_text(csv_lines([COLUMNS, ("=a car", "clean", "", "", "", "", 4)]))
    assert read_prompts(file)[0].prompt == "=a car"


def test_a_file_may_say_which_of_its_things_no_pair_names(tmp_path: Path) -> None:
    header = [*COLUMNS, "Unnamed"]
    rows: list[list[object]] = [
        ["a", "clean", "", "", "car;tree", "", 1, " tree "],
        ["b", "clean", "", "", "car", "", 2, ""],
    ]
    first, second = read_prompts(save(tmp_path, rows, header))
    assert (first.unnamed, second.unnamed) == (("tree",), ())
    rows[1][-1] = "cat"
    with pytest.raises(UserError, match=r"line 3.*cat"):
        read_prompts(save(tmp_path, rows, header))


def test_what_a_file_leaves_open_changes_no_digest_of_its_prompts(tmp_path: Path) -> None:
    rows: list[list[object]] = [["a", "clean", "", "", "car", "", 1]]
    without = read_prompts(save(tmp_path, rows, [*COLUMNS]))
    empty = read_prompts(save(tmp_path, [[*rows[0], ""]], [*COLUMNS, "unnamed"]))
    assert [p.identity() for p in without] == [p.identity() for p in empty]


def test_held_out_scenes_are_among_the_first_prompts_that_are_drawn(tmp_path: Path) -> None:
    rows: list[list[object]] = [[f"p{i}", "explicit", "violence", "gun", "", int(i % 10 == 0), i] for i in range(100)]
    chosen = choose_prompts(read_prompts(save(tmp_path, rows, [*COLUMNS])), PromptCounts(explicit=10))
    assert sum(p.held_out for p in chosen) == 5
