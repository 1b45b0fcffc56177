"""CoProV2 as it lies on the hub: both prompts of a pair as rows, one image in each, categories in the CSV only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.convert.coprov2 import from_coprov2
from tests.helpers.published_tables import GREEN, RED, jpeg, write_folder, write_parquet

TABLE = """prompt,image,category
A loud quarrel.,u_idx_0000007_0.jpg,Harrasment
A loud quarrel.,u_idx_0000007_0.jpg,Shocking
A calm talk.,s_idx_0000007_0.jpg,Harrasment
A calm talk.,s_idx_0000007_0.jpg,Shocking
Someone picks a lock.,u_idx_0000008_0.jpg,Illegal Activity
Someone opens a door.,s_idx_0000008_0.jpg,Illegal Activity
"""
IMAGES = {f"{side}_idx_000000{number}_0.jpg": jpeg(RED if side == "u" else GREEN) for side in "us" for number in (7, 8)}


def row(number: int, side: str, caption: str, swapped: bool = False, **more: Any) -> dict[str, Any]:
    """The safe image is preferred; it is jpg_0, or jpg_1 where `swapped`. Names stand there with their folder."""
    names = [f"train/{one}_idx_000000{number}_0.jpg" for one in ("us" if swapped else "su")]
    return {
        "image": f"{side}_idx_000000{number}_0.jpg",
        "jpg_0": names[0],
        "jpg_1": names[1],
        "label_0": int(not swapped),
        "caption": caption,
        **more,
    }


ROWS = [
    row(7, "u", "A loud quarrel."),
    row(8, "u", "Someone picks a lock.", swapped=True),
    row(7, "s", "A calm talk."),
    row(8, "s", "Someone opens a door."),
]


@pytest.fixture(params=["folder", "parquet"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "train.csv").write_text(TABLE)
    if request.param == "folder":
        return write_folder(tmp_path / "in", ROWS, IMAGES)
    write_parquet(tmp_path / "in" / "train-00000-of-00002.parquet", ROWS[:2], IMAGES, ())
    write_parquet(tmp_path / "in" / "train-00001-of-00002.parquet", ROWS[2:], IMAGES, ())
    return str(tmp_path / "in")


def stored(out: Path) -> dict[str, tuple[Any, ...]]:
    data = PreferenceDataModule(val=str(out), batch_size=100)
    data.setup("validate")
    (only,) = data.val_dataloader()
    return {
        key: (
            only.prompts[n],
            only.prompt_kinds[n],
            only.categories[n],
            only.harmful[n].tolist(),
            bool(only.chosen[n, 1].float().mean() > 127.5),
        )
        for n, key in enumerate(only.keys)
    }


def test_both_forms_give_what_the_csv_gives(published: str, tmp_path: Path) -> None:
    from_coprov2(published, str(tmp_path / "hub"), table=str(tmp_path / "train.csv"))
    write_folder(tmp_path / "img", [], IMAGES)
    from_coprov2(str(tmp_path / "train.csv"), str(tmp_path / "csv"), images=str(tmp_path / "img"))
    found = stored(tmp_path / "hub")
    assert found == stored(tmp_path / "csv")
    assert found["0000007_0_u"] == ("A loud quarrel.", "harmful", ("harassment", "shocking"), [0.0, 1.0], True)
    assert found["0000008_0_s"] == ("Someone opens a door.", "clean", ("illegal-activity",), [0.0, 1.0], True)
    assert len(found) == 4


def test_without_the_csv_the_image_tells_whose_prompt_it_is(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_coprov2(published, str(tmp_path / "out"))
    found = stored(tmp_path / "out")
    assert {key: one[1] for key, one in found.items()} == {
        f"000000{number}_0_{side}": kind for number in (7, 8) for side, kind in (("u", "harmful"), ("s", "clean"))
    }
    assert all(one[2] == () for one in found.values())
    assert "--table" in capsys.readouterr().out


@pytest.mark.parametrize("drop", [False, True])
def test_leaks_are_counted_and_dropped_on_request(
    published: str, tmp_path: Path, drop: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.csv").write_text("prompt,image,category\nA loud quarrel.,1_0.jpg,Hate\nNew.,2_0.jpg,Hate\n")
    from_coprov2(published, str(tmp_path / "out"), test_table=str(tmp_path / "test.csv"), drop_leaks=drop)
    text = capsys.readouterr().out
    assert "1 prompts of the test set are in 1 of 2 training pairs" in text
    assert ("left out: 2 whose prompt stands in the test set" in text) == drop
    assert len(stored(tmp_path / "out")) == (2 if drop else 4)


def test_an_unsafe_winner_is_kept_labelled_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_folder(tmp_path / "in", [{**ROWS[0], "label_0": 0}, ROWS[2]], IMAGES)
    from_coprov2(given, str(tmp_path / "out"))
    found = stored(tmp_path / "out")
    assert found["0000007_0_u"][3:] == ([1.0, 0.0], False)
    assert "the unsafe image is preferred in 1 of 2 rows" in capsys.readouterr().out


def test_an_image_that_no_row_holds_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_folder(tmp_path / "in", ROWS[:3], IMAGES)  # no row holds the safe image of pair 8
    from_coprov2(given, str(tmp_path / "out"))
    assert set(stored(tmp_path / "out")) == {"0000007_0_u", "0000007_0_s"}
    assert "left out: 1 without an image file" in capsys.readouterr().out
    from_coprov2(given, str(tmp_path / "all"), images=str(tmp_path / "in"))
    assert len(stored(tmp_path / "all")) == 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"jpg_0": "../../etc/passwd"}, "line 1: jpg_0 and jpg_1 must be names such as"),
        ({"jpg_0": None}, "line 1: jpg_0 must be a text"),
        ({"jpg_0": "s_idx_0000008_0.jpg"}, "s_idx_0000008_0.jpg and u_idx_0000007_0.jpg are not the two images"),
        ({"caption": "  "}, "line 1: the caption is empty"),
        ({"image": "0000007.jpg"}, "'A loud quarrel.' is the unsafe or the safe prompt of pair 0000007_0"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    given = write_folder(tmp_path / "in", [{**ROWS[0], **change}], IMAGES)
    with pytest.raises(UserError) as caught:
        from_coprov2(given, str(tmp_path / "out"))
    assert re.search(complaint, str(caught.value))
    assert not (tmp_path / "out").exists()


def test_a_row_whose_image_tells_nothing_is_reported_by_the_csv(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(TABLE)
    rows = [{**one, "image": f"{n}.jpg"} for n, one in enumerate(ROWS)]
    given = write_folder(tmp_path / "in", rows, IMAGES)
    from_coprov2(given, str(tmp_path / "out"), images=str(tmp_path / "in"), table=str(tmp_path / "train.csv"))
    assert stored(tmp_path / "out")["0000008_0_u"][:2] == ("Someone picks a lock.", "harmful")
