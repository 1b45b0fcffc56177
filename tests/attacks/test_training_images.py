import shutil
from pathlib import Path

import pytest

from lit_safety.attacks.lora_training import batches, encode_images, read_images, shards_digest
from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError


def test_concepts_come_in_turn_and_always_the_same(category_shards: Path) -> None:
    found = read_images(str(category_shards), 6, True, "Test")
    assert sorted(p.group for p in found) == ["hate"] * 3 + ["violence"] * 3
    assert [p.key for p in found] == [p.key for p in read_images(str(category_shards), 6, True, "Test")]
    assert {p.prompt for p in found} == {"a gun and a house"}
    only = read_images(str(category_shards), 4, True, "Test", groups=["violence"])
    assert {p.group for p in only} == {"violence"}
    assert len(only) == 4


def test_harmless_images_are_the_chosen_ones_of_clean_prompts(pair_shards: Path) -> None:
    found = read_images(str(pair_shards), 5, False, "Test")
    assert {(p.prompt, p.group) for p in found} == {("a red cat", "")}


def test_shards_without_such_images_are_refused(pair_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attack Test: .*rejected"):
        read_images(str(pair_shards), 5, True, "Test", groups=["sexual"])
    with pytest.raises(UserError, match="attack Test: shards"):
        read_images(str(tmp_path / "nothing"), 5, True, "Test")


def test_images_are_encoded_at_the_side_that_is_drawn(pair_shards: Path, tiny_pipeline: Path) -> None:
    backbone = load_backbone(str(tiny_pipeline))
    found = read_images(str(pair_shards), 2, True, "Test")
    assert encode_images(backbone, found, 32).shape[:2] == (2, 2)
    assert encode_images(backbone, found, 16).shape[-1] * 2 == encode_images(backbone, found, 32).shape[-1]


def test_every_pass_holds_every_row_once() -> None:
    dealt = batches(6, 4, seed=0)
    rows = [row for _ in range(3) for row in next(dealt)]
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows[:6] != rows[6:]
    again = batches(6, 4, seed=0)
    assert [row for _ in range(3) for row in next(again)] == rows
    other = batches(6, 4, seed=1)
    assert [row for _ in range(3) for row in next(other)] != rows


def test_shards_are_distinguished_by_content_and_not_by_place(pair_shards: Path, tmp_path: Path) -> None:
    """Without a manifest too, and where names and sizes are the same."""
    copied = shutil.copytree(pair_shards, tmp_path / "copied")
    assert shards_digest(str(copied), "Test") == shards_digest(str(pair_shards), "Test")
    (copied / "manifest.json").unlink()
    first = shards_digest(str(copied), "Test")
    shard = sorted(copied.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    shard.write_bytes(content)
    assert shards_digest(str(copied), "Test") != first
