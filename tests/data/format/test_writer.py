from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import file_sha256
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import parse_metadata
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.source import open_source
from tests.helpers.pair_shards import make_image, metadata, write_shards


def test_shards_are_plain_webdataset_tars(tmp_path: Path) -> None:
    written = write_shards(tmp_path, 5, 3)
    assert load_manifest(tmp_path) == written
    assert [shard.nsamples for shard in written.shardlist] == [3, 2]
    for shard in written.shardlist:
        path = tmp_path / shard.url
        assert (shard.bytes, shard.sha256) == (path.stat().st_size, file_sha256(path))
    with tarfile.open(tmp_path / "shard-000001.tar") as tar:
        assert tar.getnames()[:3] == ["00003.chosen.png", "00003.json", "00003.rejected.png"]
        member = tar.extractfile("00003.json")
        assert member is not None
        assert parse_metadata(member.read(), "").prompt == "prompt 3"
        member = tar.extractfile("00004.rejected.png")
        assert member is not None
        assert list(Image.open(member).getdata()) == list(make_image(104).getdata())


def test_equal_samples_give_equal_files(tmp_path: Path) -> None:
    hashes = [[s.sha256 for s in write_shards(tmp_path / name, 5, 3).shardlist] for name in "ab"]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(("image_format", "suffix"), [("jpg", "jpg"), ("webp", "webp"), ("png", "png")])
def test_images_are_stored_as_asked_and_bytes_as_given(tmp_path: Path, image_format: str, suffix: str) -> None:
    buffer = io.BytesIO()
    make_image(1).save(buffer, "JPEG")
    with ShardWriter(tmp_path, image_format=image_format) as writer:
        writer.write("k", metadata(1), make_image(1), buffer.getvalue())
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert set(tar.getnames()) == {"k.json", f"k.chosen.{suffix}", "k.rejected.jpg"}
        member = tar.extractfile("k.rejected.jpg")
        assert member is not None
        assert member.read() == buffer.getvalue()


def test_a_run_that_dies_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def die() -> None:
        with ShardWriter(tmp_path, 2) as writer:
            for number in range(3):
                writer.write(str(number), metadata(number), make_image(1), make_image(2))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        die()
    assert sorted(os.listdir(tmp_path)) == [
        ".manifest.partial.json",
        "shard-000000.tar",
        "shard-000000.tar.index.json",
    ]
    for given in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(UserError, match="not complete"):
            open_source(str(given), "train")


def test_an_earlier_run_is_not_overwritten_by_chance(tmp_path: Path) -> None:
    write_shards(tmp_path, 5, 2)
    with pytest.raises(UserError, match=r"manifest\.json"):
        ShardWriter(tmp_path)
    with ShardWriter(tmp_path, overwrite=True) as writer:
        writer.write("k", metadata(1), make_image(1), make_image(2))
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-000000.tar", "shard-000000.tar.index.json"]


def test_wrong_samples_are_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("k", metadata(1), make_image(1), make_image(2))
        with pytest.raises(UserError, match="'k': the key is used twice"):
            writer.write("k", metadata(1), make_image(1), make_image(2))
        for key in ("a.b", "__k", "a/b", "", "ü"):
            with pytest.raises(UserError, match="a key may hold only"):
                writer.write(key, metadata(1), make_image(1), make_image(2))
        with pytest.raises(UserError, match="'m': 'order' must be one of"):
            writer.write("m", metadata(1, order="best"), make_image(1), make_image(2))
        with pytest.raises(UserError, match="'m': rejected: is not a PNG"):
            writer.write("m", metadata(1), make_image(1), b"GIF89a")
    assert load_manifest(tmp_path).nsamples == 1


@pytest.mark.parametrize("resume", [False, True])
def test_no_sample_no_manifest(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(UserError, match="0 samples"), ShardWriter(tmp_path, resume=resume):
        pass
    assert os.listdir(tmp_path) == []


def test_a_run_killed_before_its_first_shard_was_noted_starts_again(tmp_path: Path) -> None:
    ShardWriter(tmp_path, resume=True)  # notes that the folder is its own
    (tmp_path / "shard-000000.tar").write_bytes(b"renamed, but not noted yet")
    with ShardWriter(tmp_path, provenance={"another": "setting"}, resume=True) as writer:
        writer.write("k", metadata(1), make_image(1), make_image(2))
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-000000.tar", "shard-000000.tar.index.json"]
    assert file_sha256(tmp_path / "shard-000000.tar") == load_manifest(tmp_path).shardlist[0].sha256


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), ShardWriter(tmp_path / "file") as writer:
        writer.write("k", metadata(1), make_image(1), make_image(2))
