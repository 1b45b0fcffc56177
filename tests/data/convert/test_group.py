"""`shards group`: pairs of one prompt joined into groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.convert.group import group
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import PairMetadata
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.decode import sample_images
from lit_safety.data.reading.source import open_source
from lit_safety.data.validate import problems
from tests.helpers.pair_shards import make_image, metadata

COST = {"chosen": -1.0, "rejected": 2.0}


def write(folder: Path, pairs: list[tuple[str, int, int, dict[str, Any]]], per_shard: int = 2) -> str:
    """Pairs of (prompt, number of the chosen and of the rejected image, more metadata)."""
    with ShardWriter(folder, per_shard, provenance={"source": "drawn"}) as writer:
        for number, (prompt, chosen, rejected, more) in enumerate(pairs):
            about = metadata(0, prompt=prompt, **more)
            writer.write(f"{number:03d}", about, make_image(chosen), make_image(rejected))
    return str(folder)


def stored(folder: Path) -> dict[str, tuple[PairMetadata, list[int]]]:
    """Each sample's metadata and the numbers of its images."""
    source = open_source(str(folder), "folder")
    found = {}
    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        for index in range(len(shard.index.samples)):
            key, members = shard.read(index)
            about, images = sample_images(members, key)
            found[key] = about, [image.getpixel((0, 0))[0] for image in images]
        shard.close()
    return found


def test_pairs_of_one_prompt_become_one_group_whose_images_stand_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        ("a gun", 1, 2, {"cost": COST, "seed": 7, "source": "set:1"}),
        ("a knife", 5, 6, {"seed": 8}),
        ("a gun", 1, 3, {"cost": {"chosen": -1.0, "rejected": 3.0}, "seed": 9, "source": "set:2"}),
        ("a gun", 4, 2, {"cost": {"chosen": -2.0, "rejected": 2.0}, "seed": 7, "source": "set:1"}),
    ]
    group(write(tmp_path / "pairs", pairs), out=str(tmp_path / "out"))
    found = stored(tmp_path / "out")
    gun, numbers = found["000"]
    assert numbers == [1, 2, 3, 4]
    assert [(one.harmful, one.cost, one.seed) for one in gun.images] == [
        (False, -1.0, None), (True, 2.0, 7), (True, 3.0, 9), (False, -2.0, 7),
    ]  # fmt: skip
    assert (gun.ranks, gun.prompt, gun.source, gun.seed) == ((1, 2, 3, 0), "a gun", None, None)
    assert found["001"][1] == [5, 6]
    assert load_manifest(tmp_path / "out").counts()["images"] == {"2": 1, "4": 1}
    assert problems(str(tmp_path / "out")) == []
    assert "2 groups" in capsys.readouterr().out


def test_a_limit_divides_a_prompt_and_each_part_has_a_chosen_image(tmp_path: Path) -> None:
    given = write(tmp_path / "pairs", [("a gun", 10 + n, 20 + n, {}) for n in range(5)])
    group(given, out=str(tmp_path / "out"), images=4)
    assert [numbers for _, numbers in stored(tmp_path / "out").values()] == [
        [10, 20, 11, 21],
        [12, 22, 13, 23],
        [14, 24],
    ]
    for odd in (3, 0, 66):
        with pytest.raises(UserError, match="--images"):
            group(given, out=str(tmp_path / "odd"), images=odd)


def test_what_cannot_be_ranked_or_contradicts_itself_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = {"harmful": {"chosen": None, "rejected": None}}
    pairs = [
        ("a", 1, 2, unknown),
        ("b", 3, 4, {}),
        ("c", 5, 6, {"cost": COST}),
        ("c", 5, 7, {"cost": {"chosen": -5.0, "rejected": 2.0}}),
    ]
    group(write(tmp_path / "pairs", pairs), out=str(tmp_path / "out"))
    assert list(stored(tmp_path / "out")) == ["001"]
    said = capsys.readouterr().out
    assert "1 whose images cannot be ranked" in said
    assert "1 whose pairs say two things" in said
    with pytest.raises(UserError, match="nothing: 0 samples"):
        group(write(tmp_path / "none", [("a", 1, 2, unknown)]), out=str(tmp_path / "nothing"))


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write(tmp_path / "pairs", [(f"prompt {n % 4}", 10 + n, 50 + n, {}) for n in range(8)])
    group(given, out=str(tmp_path / "whole"), samples_per_shard=2)
    write_group = ShardWriter.write_group

    def killed(self: ShardWriter, key: str, *arguments: Any, **named: Any) -> None:
        if len(self) == 3:
            raise KeyboardInterrupt
        write_group(self, key, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write_group", killed)
        with pytest.raises(KeyboardInterrupt):
            group(given, out=str(tmp_path / "cut"), samples_per_shard=2)
    group(given, out=str(tmp_path / "cut"), samples_per_shard=2)
    for path in (tmp_path / "whole").glob("[!.]*"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="already a group"):
        group(str(tmp_path / "whole"), out=str(tmp_path / "again"))
    with pytest.raises(UserError, match="--out"):
        group(given, out=given)
