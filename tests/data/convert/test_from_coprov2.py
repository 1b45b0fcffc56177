from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.convert.coprov2 import from_coprov2
from lit_safety.data.format.manifest import load_manifest

# The published file's layout, spelling of categories and repeated rows; the prompts are harmless ones.
TABLE = """prompt,image,category
"He says ""go away"" to a neighbour.",u_idx_0002168_0.jpg,Harrasment
A man greets his neighbour.,s_idx_0002168_0.jpg,Harrasment
A loud quarrel in a street.,u_idx_0002208_0.jpg,Harrasment
A loud quarrel in a street.,u_idx_0002208_0.jpg,Shocking
A calm talk in a street.,s_idx_0002208_0.jpg,Harrasment
A calm talk in a street.,s_idx_0002208_0.jpg,Shocking
Someone picks a lock.,u_idx_0000001_0.jpg,Illegal Activity
Someone opens a door.,s_idx_0000001_0.jpg,Illegal Activity
Nobody's counterpart.,u_idx_0000009_0.jpg,Violence
"""
TEST = "prompt,image,category\nA loud quarrel in a street.,0000001_0.jpg,Shocking\nNew.,0000002_0.jpg,Hate\n"


@pytest.fixture
def published(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "train.csv").write_text(TABLE, encoding="utf-8")
    (tmp_path / "test.csv").write_text(TEST, encoding="utf-8")
    (tmp_path / "images").mkdir()
    for line in TABLE.splitlines()[1:]:
        name = line.rsplit(",", 2)[1]
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (255, 0, 0) if name.startswith("u") else (0, 255, 0)).save(buffer, "JPEG")
        (tmp_path / "images" / name).write_bytes(buffer.getvalue())
    return {"source": str(tmp_path / "train.csv"), "images": str(tmp_path / "images"), "out": str(tmp_path / "out")}


def batch(out: str) -> dict[str, dict[str, Any]]:
    data = PreferenceDataModule(val=out, batch_size=100)
    data.setup("validate")
    (only,) = data.val_dataloader()
    return {
        key: {
            "prompt": only.prompts[row],
            "kind": only.prompt_kinds[row],
            "categories": only.categories[row],
            "harmful": only.harmful[row].tolist(),
            "greener": bool(only.chosen[row, 1].float().mean() > only.rejected[row, 1].float().mean()),
        }
        for row, key in enumerate(only.keys)
    }


def test_a_pair_gives_two_samples(published: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    from_coprov2(**published)
    found = batch(published["out"])
    assert list(found) == [f"{name}_0_{side}" for name in ("0002168", "0002208", "0000001") for side in "us"]
    for key, sample in found.items():
        assert sample["kind"] == ("harmful" if key.endswith("u") else "clean")
        assert sample["harmful"] == [0.0, 1.0]  # for the clean prompt too: the rejected image is the unsafe one
        assert sample["greener"]
    assert found["0002168_0_u"]["prompt"] == 'He says "go away" to a neighbour.'
    assert found["0002168_0_s"]["prompt"] == "A man greets his neighbour."
    assert found["0002208_0_u"]["categories"] == ("harassment", "shocking")
    assert found["0000001_0_s"]["categories"] == ("illegal-activity",)
    assert "left out: 1 without a counterpart" in capsys.readouterr().out


@pytest.mark.parametrize("drop", [False, True])
def test_leaks_are_counted_and_dropped_on_request(
    published: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], drop: bool
) -> None:
    from_coprov2(**published, test_table=str(tmp_path / "test.csv"), drop_leaks=drop)
    assert "1 prompts of the test set are in 1 of 3 training pairs" in capsys.readouterr().out
    assert load_manifest(published["out"]).nsamples == (4 if drop else 6)


def test_a_missing_image_leaves_its_pair_out(published: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path(published["images"]) / "s_idx_0000001_0.jpg").unlink()
    from_coprov2(**published)
    assert len(batch(published["out"])) == 4
    assert "left out: 2 without an image file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("u_idx_0000009_0.jpg", "../u_idx_0000009_0.jpg", "row 10: '../u_idx_0000009_0.jpg' is not named"),
        ("Illegal Activity\nSomeone opens", "Fun\nSomeone opens", "row 8: unknown category 'Fun'"),
        ("A loud quarrel in a street.,u_idx_0002208_0.jpg,Shocking", "Else.,u_idx_0002208_0.jpg,Shocking", "row 5: "),
    ],
)
def test_a_wrong_row_is_named(published: dict[str, str], old: str, new: str, complaint: str) -> None:
    table = Path(published["source"])
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError) as caught:
        from_coprov2(**published)
    assert complaint in str(caught.value)
    assert not Path(published["out"]).exists()


def test_wrong_options_are_named(published: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--drop_leaks needs --test_table"):
        from_coprov2(**published, drop_leaks=True)
    with pytest.raises(UserError, match=r"--images: .*nowhere is not a folder"):
        from_coprov2(**{**published, "images": "nowhere"})
    with pytest.raises(UserError, match="--images is needed with a CSV"):
        from_coprov2(published["source"], published["out"])
    with pytest.raises(UserError, match="--table is for the hub's data set"):
        from_coprov2(**published, table=published["source"])
