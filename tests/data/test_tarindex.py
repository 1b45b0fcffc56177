"""Tar files that do not end where tarfile stops reading, and headers that nobody wrote in good faith."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pair_shards import sample, write_tar

from lit_safety.data.source import open_source
from lit_safety.data.tarindex import index_tar
from lit_safety.errors import UserError

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
    "a garbled header": (lambda data, at: data[:at] + b"\x99" * 512 + data[at + 512 :], "no header at byte"),
    "cut between samples": (lambda data, at: data[:at], "its end is missing"),
    "two in one": (lambda data, at: data + data, "more follows the end of the tar file"),
    "a size below 0": (lambda data, at: data[:at] + header(BELOW_ZERO) + bytes(1024), "has a size below 0"),
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
    with pytest.raises(UserError, match=r"a\.tar: .*copy it again or leave it out"):
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
    with pytest.raises(UserError, match=r"b\.tar: holds no sample"):
        open_source(str(tmp_path), "data.train")
