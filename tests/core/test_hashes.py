"""What is remembered of large files, and what makes them be read again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.core import hashes
from lit_safety.core import hashes as user_cache
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import SMALL, file_sha256, files_below, tensor_hashes


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large enough to be remembered; files need not be left alone for long."""
    monkeypatch.setenv("LIT_SAFETY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"1" * SMALL)
    return path


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of which files the content is hashed from now on."""
    seen: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: seen.append(file.name) or digest(file, kind))
    return seen


def test_a_large_file_is_read_once_and_again_when_it_was_touched(large: Path, monkeypatch: pytest.MonkeyPatch):
    seen = reads(monkeypatch)
    first = file_sha256(large, remember=True)
    assert file_sha256(large, remember=True) == first == hashlib.sha256(b"1" * SMALL).hexdigest()
    assert len(seen) == 1
    times = large.stat().st_mtime_ns
    large.write_bytes(b"2" * SMALL)
    os.utime(large, ns=(times, times))  # as `cp -p` and `rsync --times` do: same size, same time
    assert file_sha256(large, remember=True) == hashlib.sha256(b"2" * SMALL).hexdigest()
    assert file_sha256(large) == hashlib.sha256(b"2" * SMALL).hexdigest()
    assert len(seen) == 3  # without `remember` it is always read


def test_a_link_is_read_as_what_it_points_at(large: Path, tmp_path: Path):
    other = tmp_path / "other.bin"
    other.write_bytes(b"2" * SMALL)
    link = tmp_path / "link"
    link.symlink_to(large)
    first = file_sha256(link, remember=True)
    link.unlink()
    link.symlink_to(other)
    assert file_sha256(link, remember=True) != first
    assert file_sha256(link, remember=True) == file_sha256(other)


def test_what_changed_just_now_is_not_remembered(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "SETTLED", 60.0)
    file_sha256(large, remember=True)
    assert not (tmp_path / "cache").exists()
    future = time.time() + 3600
    os.utime(large, (future, future))
    file_sha256(large, remember=True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"state": null}', "[" * 5000, '{"found": 3}'])
def test_a_damaged_note_is_not_believed(large: Path, tmp_path: Path, damage: str):
    first = file_sha256(large, remember=True)
    (note,) = (tmp_path / "cache").rglob("*.json")
    stated = json.loads(note.read_text())
    note.write_text(json.dumps(stated | {"found": 3}) if damage == '{"found": 3}' else damage)
    assert file_sha256(large, remember=True) == first


def test_a_cache_that_cannot_be_written_costs_time_alone(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cache").write_text("a file")
    assert file_sha256(large, remember=True) == hashlib.sha256(b"1" * SMALL).hexdigest()
    monkeypatch.delenv("LIT_SAFETY_CACHE")
    monkeypatch.setattr(user_cache, "user_cache", lambda: Path("/proc/nothing"))
    assert file_sha256(large, remember=True) == hashlib.sha256(b"1" * SMALL).hexdigest()


def test_without_a_home_a_folder_of_ones_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LIT_SAFETY_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = user_cache.user_cache()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)  # somebody else was here first
    with pytest.raises(UserError, match="LIT_SAFETY_CACHE"):
        user_cache.user_cache()


def test_tensors_are_remembered_too(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"a": torch.zeros(SMALL // 4), "b": torch.zeros(2, 0)}, tmp_path / "m.safetensors")
    first = tensor_hashes(tmp_path / "m.safetensors")
    monkeypatch.setattr(hashes, "_tensors", lambda path: pytest.fail("is read again"))
    assert tensor_hashes(tmp_path / "m.safetensors") == first
    assert [json.loads(line)[:3] for line in first] == [["a", "F32", [SMALL // 4]], ["b", "F32", [2, 0]]]


def test_a_file_of_tensors_that_lie_over_each_other_is_refused(tmp_path: Path):
    """It could make a small file take hours."""
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    for header in ({"a": entry, "b": entry}, {"a": entry | {"data_offsets": [0, 9]}}, ["a"], {"a": 3}):
        raw = json.dumps(header).encode()
        (tmp_path / "m.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
        with pytest.raises(UserError, match=r"m\.safetensors"):
            tensor_hashes(tmp_path / "m.safetensors")


def test_pipes_and_devices_are_refused_instead_of_being_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(UserError, match=str(path)):
            file_sha256(path)
        with pytest.raises(UserError, match=str(path)):
            tensor_hashes(path)


def test_links_to_folders_are_entered_and_circles_end(tmp_path: Path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.txt").touch()
    top = tmp_path / "top"
    top.mkdir()
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (top / "round").symlink_to(top)
    (top / "gone").symlink_to(tmp_path / "nothing")
    (top / "._hidden").touch()
    assert [file.relative_to(top).as_posix() for file in files_below(top)] == ["linked/deep/a.txt"]
