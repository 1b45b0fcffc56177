"""Files are written completely and by one writer at a time; a killed writer does not block others."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.__main__ import main
from lit_safety.core import files as atomic
from lit_safety.core.errors import UserError
from lit_safety.core.files import Lock, append_line, atomic_file, atomic_folder, lock_of, one_writer, write_atomic
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.source import open_source
from tests.helpers.full_disk import full_disk
from tests.helpers.pair_shards import make_image, metadata

#: Takes the lock of a folder, says so, and keeps it.
HOLDER = """
import sys, time
from pathlib import Path
from lit_safety.core.files import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_one_process_writes_a_folder_and_a_killed_one_does_not_block_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "out", tmp_path / "table.csv"
    make_image(1).save(tmp_path / "a.png")
    make_image(2).save(tmp_path / "b.png")
    table.write_text("prompt,chosen,rejected,prompt_kind\na cat,a.png,b.png,clean\n")
    command = ["shards", "from-folder", str(table), str(out)]
    with held_elsewhere(out) as holder:
        assert main(command) == 2
        assert str(out) in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process"):
            ShardWriter(out)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert main(command) == 0
    shard = "shard-000000.tar"
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", shard, f"{shard}.index.json"]


def test_a_second_writer_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("k", metadata(1), make_image(1), make_image(2))
        with pytest.raises(UserError, match="another process"):
            ShardWriter(tmp_path / "out", overwrite=True)
        with pytest.raises(UserError, match="not complete"):
            open_source(str(tmp_path / "out"), "train")
    assert open_source(str(tmp_path / "out"), "train").manifest.nsamples == 1


def test_what_a_command_calls_writes_under_its_lock(tmp_path: Path) -> None:
    with one_writer(tmp_path / "out"):
        with ShardWriter(tmp_path / "out") as writer:
            writer.write("k", metadata(1), make_image(1), make_image(2))
        assert lock_of(tmp_path / "out").exists()
    assert not lock_of(tmp_path / "out").exists()


def test_a_refused_command_leaves_no_folder(tmp_path: Path) -> None:
    assert main(["shards", "from-folder", str(tmp_path / "none.csv"), str(tmp_path / "a" / "b")]) == 2
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A loader's worker outlives a killed parent by seconds."""
    lock = Lock(tmp_path / ".lock", "busy")
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()

    def wait() -> None:
        ready.set()
        end.wait(30)

    process = context.Process(target=wait)
    process.start()
    assert ready.wait(30)
    assert lock.descriptor is not None
    os.close(lock.descriptor)  # as when the parent is killed: the file stays
    lock.descriptor = None
    Lock(tmp_path / ".lock", "busy").release()
    end.set()
    process.join()


def test_without_locks_it_is_said_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(descriptor: int, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic, "lock_descriptor", unknown)
    with one_writer(tmp_path / "out"):
        write_atomic(tmp_path / "out" / "a", b"1")
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert (tmp_path / "out" / "a").read_bytes() == b"1"


def test_two_writers_of_one_file_do_not_mix_their_bytes(tmp_path: Path) -> None:
    path, both = tmp_path / "file", threading.Barrier(2)

    def write(letter: bytes) -> None:
        with atomic_file(path) as file:
            both.wait(30)
            for _ in range(50):
                file.write(letter * 1000)
                file.flush()
            both.wait(30)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 50_000, b"b" * 50_000)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_file, left_folder = tmp_path / ".a.0123abcd.partial", tmp_path / ".b.0123abcd.partial"
    left_file.write_bytes(b"half")
    left_folder.mkdir()
    (left_folder / "weights").write_bytes(b"half")
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / ".c.0123abcd.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".notes.partial").write_text("mine")
    with atomic_file(tmp_path / "c") as file:
        file.write(b"c")
        assert not left_file.exists()
        assert not left_folder.exists()
        monkeypatch.setattr(atomic, "_cleared", set())
        write_atomic(tmp_path / "d", b"d")
    assert (tmp_path / "c").read_bytes() == b"c"
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert (tmp_path / ".notes.partial").exists()


def test_files_have_the_mode_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (write_atomic(tmp_path / "a", b""), tmp_path / "plain")]
    assert modes[0] == modes[1]


def test_a_folder_that_a_kill_left_between_two_renames_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "weights").write_text("before")
    with pytest.raises(RuntimeError, match="failed"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("failed")
    assert (tmp_path / "out" / "weights").read_text() == "before"
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "weights").write_text("after")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "after"


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_full_disk_is_one_line_whatever_library_writes(library: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("before")

    def write() -> None:
        with atomic_folder(tmp_path / "out") as partial:
            (torch.save if library == "torch" else save_file)({"a": torch.ones(100_000)}, partial / "weights")

    with pytest.raises(UserError, match=str(tmp_path / "out")) as said, full_disk(10_000):
        write()
    assert "\n" not in str(said.value)
    assert (tmp_path / "out" / "weights").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_line_after_one_that_was_cut_short_stands_alone(tmp_path: Path) -> None:
    """A kill leaves half a line: the next one is not lost with it."""
    file = tmp_path / "journal.jsonl"
    append_line(file, '{"round": 0}')
    with file.open("a") as half:
        half.write('{"rou')
    append_line(file, '{"round": 1, "word": "\u00e4"}')
    append_line(file, '{"round": 2}')
    assert file.read_text(encoding="utf-8").splitlines() == [
        '{"round": 0}', '{"rou', '{"round": 1, "word": "\u00e4"}', '{"round": 2}',
    ]  # fmt: skip
