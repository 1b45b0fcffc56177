"""Tar files that do not end where tarfile stops reading, and forged headers."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.tar_index import OpenShard, index_tar
from lit_safety.data.reading.source import open_source
from lit_safety.data.validate import problems
from tests.helpers.pair_shards import sample, write_tar

Spoil = Callable[[bytes, int], bytes]


def header(size: bytes = b"", **options: bytes) -> bytes:
    """A header block named `9.json`; ``size`` replaces its 12 bytes of size, the checksum is right."""
    block = bytearray(tarfile.TarInfo("9.json").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size or block[124:136]
    block[156:157] = options.get("kind", b"0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


BELOW_ZERO = b"\xff" * 10 + (2**16 - 512).to_bytes(2, "big")  # base 256: -512, back to this very header

DAMAGE: dict[str, tuple[Spoil, str]] = {
    "a garbled header": (lambda data, at: data[:at] + b"\x99" * 512 + data[at + 512 :], "should begin a header"),
    "cut between samples": (lambda data, at: data[:at], "its end is missing"),
    "two in one": (lambda data, at: data + data, "after the end of the tar file"),
    "a size below 0": (lambda data, at: data[:at] + header(BELOW_ZERO) + bytes(1024), "has a negative size"),
    "headers of headers": (lambda data, at: data[:at] + header(kind=b"x") * 5000 + bytes(1024), "RecursionError"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_tarfile_takes_for_the_end_is_not_believed(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(str(number), sample(number)) for number in range(4)])
    assert index_tar(path).problem is None
    spoil, message = DAMAGE[name]
    third = index_tar(path).samples[2].members["json"][0] - tarfile.BLOCKSIZE
    path.write_bytes(spoil(path.read_bytes(), third))
    found = index_tar(path)
    assert found.problem is not None
    assert message in found.problem
    assert [one.key for one in found.samples][:2] == ["0", "1"]
    with pytest.raises(UserError, match=r"a\.tar: "):
        open_source(str(tmp_path), "data.train")


def test_headers_that_make_no_sense_are_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.json")
        info.pax_headers = {"GNU.sparse.map": "a,b", "GNU.sparse.major": "0", "GNU.sparse.minor": "1"}
        tar.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match=r"a\.tar: is not a readable tar file \(invalid literal"):
        index_tar(tmp_path / "a.tar")


def test_a_tar_of_nul_bytes_is_no_shard_even_without_a_manifest(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0", sample(0))])
    (tmp_path / "b.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=r"b\.tar: holds 0 samples"):
        open_source(str(tmp_path), "data.train")


Members = list[tuple[str, bytes] | tarfile.TarInfo]


def pair(key: str, number: int) -> Members:
    return [(f"{key}.{suffix}", data) for suffix, data in sample(number).items()]


def packed(folder: Path, members: Members, name: str = "shard.tar") -> Path:
    """A shard of these members in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return folder


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = [member for number in range(3) for member in pair(f"{number}", number)]
# What stands next to 3 good pairs: how many samples there are then, and what every complaint names.
BESIDE: dict[str, tuple[Members, int, str]] = {
    "a key with dots": (pair("4_sd1.5", 4), 4, "4_sd1.5.json"),
    "a key with dots twice": (pair("a.b", 4) + pair("a.c", 5), 5, r"a\.[bc]\.json"),
    "dots of a good key": (pair("2.b", 4), 4, "2.b.json"),
    "a symbolic link": ([*pair("4", 4)[:2], link("4.rejected.png", "1.rejected.png", tarfile.SYMTYPE)], 4, "symbolic"),
    "a hard link to nothing": ([*pair("4", 4)[:2], link("4.rejected.png", "9.png", tarfile.LNKTYPE)], 4, "9.png"),
    "a device": ([*pair("4", 4)[:2], link("4.rejected.png", "", tarfile.CHRTYPE)], 4, "rejected.png"),
    "a gif": ([*pair("4", 4)[:2], ("4.rejected.gif", b"GIF89a")], 4, "rejected.gif"),
    "images without json": ([("g/4.0.png", b"x"), ("g/4.1.png", b"x")], 4, "'g/4': .*json"),
    "images of another name": ([("4_chosen.png", b"x"), ("4_rejected.png", b"x")], 5, "4_(chosen|rejected).png"),
    "metadata in one file": ([("metadata.jsonl.json", b"[]")], 4, "metadata.jsonl.json"),
    "an image without a key": ([(".chosen.png", b"x")], 4, ".chosen.png"),
    "a caption and no json": ([*pair("4", 4)[1:], ("4.txt", b"a caption")], 4, "lacks its json"),
    "a member twice": ([*pair("4", 4), pair("4", 4)[1]], 4, "holds chosen.png twice"),
    "members apart": (pair("4", 4)[:1] + pair("5", 5) + pair("4", 4)[1:], 6, "'4'"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_member_is_read_or_named_in_an_error(tmp_path: Path, name: str) -> None:
    """By validation as by training, which counts it too where bad samples are left out."""
    beside, samples, complaint = BESIDE[name]
    folder = str(packed(tmp_path, GOOD + beside))
    source = open_source(folder, "train")
    assert source.manifest.nsamples == samples
    found = problems(folder)
    assert len(found) == (samples - 3 if name != "members apart" else 2)
    assert all(re.search(complaint, line) for line in found)
    data = PreferenceDataModule(train=folder, batch_size=1, num_workers=0)
    data.setup("fit")
    with pytest.raises(UserError, match=complaint):
        list(data.train_dataloader())


IGNORED: dict[str, Members] = {
    "macOS": [
        ("._0.chosen.png", b"\0\5\x16\7"),
        ("a/._b.json", b"\0"),
        ("a/.DS_Store", b"x"),
        ("__MACOSX/0.png", b"x"),
    ],
    "next to a pair": [("2.txt", b"a caption"), ("2.thumb.png", b"x"), ("2.cls", b"1")],
    "no image": [("README.md", b"#"), ("LICENSE", b"MIT"), ("json", b"")],
    "folders": [link("pairs.json/", "", tarfile.DIRTYPE)],
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_no_part_of_a_pair_is_passed_over(tmp_path: Path, name: str) -> None:
    """The same before, after and inside a sample."""
    folder = packed(tmp_path, [*IGNORED[name], *GOOD[:1], *IGNORED[name], *GOOD[1:], *IGNORED[name]])
    if name == "next to a pair":
        folder = packed(tmp_path, [*GOOD, *IGNORED[name]])
    assert problems(str(folder)) == []
    assert open_source(str(folder), "train").manifest.nsamples == 3


def test_a_hard_link_is_the_member_it_leads_to(tmp_path: Path) -> None:
    """GNU tar packs the second of two linked files so, with `./` before each name."""
    first = [(f"./{name}", data) for name, data in pair("0", 0)]
    second = [("./1.json", sample(1)["json"])]
    links = [link(f"./1.{side}.png", f"./0.{side}.png", tarfile.LNKTYPE) for side in ("chosen", "rejected")]
    folder = packed(tmp_path, [*first, *second, *links])
    assert problems(str(folder)) == []
    shard = OpenShard(str(folder / "shard.tar"))
    assert shard.read(1)[1] == {**shard.read(0)[1], "json": sample(1)["json"]}


def test_endings_in_capitals_and_shards_next_to_those_of_macos(tmp_path: Path) -> None:
    folder = packed(tmp_path, [(name.replace(".png", ".PNG"), data) for name, data in GOOD], "data.TAR")
    (folder / "._data.TAR").write_bytes(b"\0\5\x16\7Mac OS X")
    assert problems(str(folder)) == []
    (folder / "more.tar.gz").write_bytes(gzip.compress((folder / "data.TAR").read_bytes()))
    with pytest.raises(UserError, match=r"more\.tar\.gz is compressed"):
        open_source(str(folder), "train")
    (folder / "more.tar.gz").rename(folder / "more.tar")
    with pytest.raises(UserError, match=r"more\.tar: .*unpack it"):
        open_source(str(folder), "train")


def test_same_names_in_two_folders_are_two_samples(tmp_path: Path) -> None:
    folder = packed(tmp_path, pair("v1.5/a/0", 0) + pair("v1.5/b/0", 1))
    assert [one.key for one in index_tar(folder / "shard.tar").samples] == ["v1.5/a/0", "v1.5/b/0"]
    assert problems(str(folder)) == []


def test_images_without_an_ending_that_are_no_samples_are_reported(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0", sample(0)), ("9", {"chosen": b"x", "rejected": b"y"})])
    (lone,) = [one for one in index_tar(tmp_path / "a.tar").samples if one.key == "9"]
    assert lone.problem is not None
    assert "9.chosen" in lone.problem
