"""Pick-a-Pic's rows, out of parquet where pyarrow is there and out of a folder with metadata.jsonl everywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.core.images import decode_image
from lit_safety.data.convert.pickapic import from_pickapic
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import PairMetadata, Sides, parse_metadata
from lit_safety.data.format.tar_index import OpenShard
from tests.helpers.published_tables import GREEN, RED, jpeg, write_folder, write_parquet

IMAGES = {"a.jpg": jpeg(RED), "b.jpg": jpeg(GREEN)}


def row(label: Any, **more: Any) -> dict[str, Any]:
    return {"caption": "a cat", "jpg_0": "a.jpg", "jpg_1": "b.jpg", "label_0": label, "label_1": _other(label), **more}


def _other(label: Any) -> Any:
    return 1 - label if isinstance(label, int | float) else label


ROWS = [
    row(1.0, ranking_id=11),
    row(0.0, ranking_id=12, caption="ein Bär, 熊"),
    row(0.5, ranking_id=13),
    row(0.5, ranking_id=14, has_label=False),
    row(0.25, ranking_id=15),
    row(1.0, ranking_id=16, label_1=1.0),
    row(1.0, ranking_id=17, are_different=False),
    row(1.0, ranking_id=18, caption=" "),
]


def filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"has_label": True, "are_different": True, **one} for one in rows]


@pytest.fixture(params=["folder", "parquet"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return write_folder(tmp_path / "in", filled(ROWS), IMAGES)
    first, second = filled(ROWS[:5]), filled(ROWS[5:])
    write_parquet(tmp_path / "in" / "train-00000-of-00002-0a.parquet", first, IMAGES, ("jpg_0", "jpg_1"))
    write_parquet(tmp_path / "in" / "train-00001-of-00002-0b.parquet", second, IMAGES, ("jpg_0", "jpg_1"))
    return str(tmp_path / "in")


def stored(folder: Path) -> dict[str, tuple[PairMetadata, bool]]:
    """Key to metadata and whether the chosen image is the red one."""
    found = {}
    for one in load_manifest(folder).shardlist:
        shard = OpenShard(str(folder / one.url))
        for number in range(one.nsamples):
            key, members = shard.read(number)
            red, green, _ = decode_image(members["chosen.jpg"], key).getpixel((0, 0))  # type: ignore[misc]
            found[key] = parse_metadata(members["json"], key), red > green
        shard.close()
    return found


def test_the_label_says_which_image_is_chosen(
    published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_pickapic(published, str(tmp_path / "out"))

    def pair(prompt: str, key: str) -> PairMetadata:
        return PairMetadata(prompt, "clean", "quality", score=Sides(1.0, 0.0), source=f"Pick-a-Pic {key}")

    assert stored(tmp_path / "out") == {
        "11": (pair("a cat", "11"), True),
        "12": (pair("ein Bär, 熊", "12"), False),
    }
    text = capsys.readouterr().out
    assert "left out: 1 that are ties" in text
    assert "left out: 1 without a label" in text
    assert "left out: 2 with labels that are not 1 and 0" in text
    assert "left out: 1 whose images are the same" in text
    assert "left out: 1 with a caption" in text


def test_ties_are_kept_on_request_with_equal_scores(published: str, tmp_path: Path) -> None:
    from_pickapic(published, str(tmp_path / "out"), ties="keep")
    metadata, red = stored(tmp_path / "out")["13"]
    assert metadata.score == Sides(0.5, 0.5)
    assert red


def test_only_so_many_rows_are_read(published: str, tmp_path: Path) -> None:
    from_pickapic(published, str(tmp_path / "out"), limit=1)
    assert list(stored(tmp_path / "out")) == ["11"]


@pytest.mark.parametrize("label", ["1", None, True, [1], float("nan"), 7])
def test_a_label_of_another_kind_is_left_out(tmp_path: Path, label: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_folder(tmp_path / "in", [{**row(1), "label_1": 0}, row(label)], IMAGES)
    from_pickapic(given, str(tmp_path / "out"))
    assert list(stored(tmp_path / "out")) == ["00000000"]
    assert "left out: 1 with labels that are not" in capsys.readouterr().out


def test_images_that_are_missing_or_lie_elsewhere_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.jpg", "gone.jpg", "../secret.jpg", "/etc/passwd", "text.jpg", 3]
    rows = [row(1, jpg_0=name) for name in names]
    (tmp_path / "secret.jpg").write_bytes(jpeg(RED))
    from_pickapic(write_folder(tmp_path / "in", rows, {**IMAGES, "text.jpg": b"text"}), str(tmp_path / "out"))
    assert len(stored(tmp_path / "out")) == 1
    text = capsys.readouterr().out
    assert "left out: 1 without an image file" in text
    assert "left out: 1 with an image that cannot be read" in text
    assert "left out: 3 with a caption or an image's name that cannot be used" in text


def test_a_key_that_occurs_twice_is_not_lost_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1, ranking_id=1), row(0, ranking_id=1)]
    from_pickapic(write_folder(tmp_path / "in", rows, IMAGES), str(tmp_path / "out"))
    assert len(stored(tmp_path / "out")) == 1
    assert "left out: 1 whose key stands there twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ('{"caption": "x"}', "has no column 'label_0'; its columns are caption"),
        ("", "has no column 'label_0'; its columns are none"),
        ('{"caption": \n', "line 1: is not JSON"),
        ("[1]", "line 1: must be a JSON object"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('"' + "x" * (1 << 20) + '"', "line 1 is over the limit"),
    ],
    ids=["column", "empty", "cut", "list", "deep", "long"],
)
def test_a_broken_table_is_one_line(tmp_path: Path, lines: str, complaint: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError) as caught:
        from_pickapic(str(tmp_path), str(tmp_path / "out"))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither metadata\.jsonl nor parquet files"):
        from_pickapic(str(tmp_path), "out")
    for split in ("train", "test"):
        (tmp_path / f"{split}-00000-of-00001.parquet").touch()
    with pytest.raises(UserError, match=r"holds several splits \(test, train\), which must not be mixed"):
        from_pickapic(str(tmp_path), "out")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match=r"parquet files need pyarrow.*pip install 'lit-safety\[parquet\]'"):
        from_pickapic(str(tmp_path / "x.parquet"), "out")


# ---- what only parquet can be


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"PAR1 and nothing more", "is not a parquet file that can be read"),
        (b"", "is not a parquet file that can be read"),
    ],
)
def test_a_broken_parquet_file_is_one_line(tmp_path: Path, data: bytes, complaint: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(UserError, match=complaint) as caught:
        from_pickapic(str(tmp_path / "x.parquet"), "out")
    assert "\n" not in str(caught.value)


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = Path(write_parquet(tmp_path / "x.parquet", filled(ROWS), IMAGES, ("jpg_0", "jpg_1")))
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.parquet: row group 0 cannot be read"):
        from_pickapic(str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_cell_without_an_image_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1), row(1, jpg_1=None)]
    from_pickapic(write_parquet(tmp_path / "x.parquet", rows, IMAGES, ("jpg_0", "jpg_1")), str(tmp_path / "out"))
    assert list(stored(tmp_path / "out")) == ["00000000"]
    assert "left out: 1 without an image file" in capsys.readouterr().out


def test_names_in_a_parquet_file_lead_to_files_next_to_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "img", [], IMAGES)
    given = write_parquet(tmp_path / "in" / "x.parquet", [row(1)], IMAGES, ())
    from_pickapic(given, str(tmp_path / "out"), images=str(tmp_path / "img"))
    ((metadata, red),) = stored(tmp_path / "out").values()
    assert (metadata.prompt, red) == ("a cat", True)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"]["table"][0][0] == "x.parquet"
