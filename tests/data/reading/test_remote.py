"""Shards over http from a server on this machine, and out of an fsspec store."""

from __future__ import annotations

import email.utils
import functools
import http.server
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.inspect import inspect
from lit_safety.data.reading import source as remote
from lit_safety.data.reading.source import fetch
from tests.helpers.pair_shards import make_image, metadata, write_shards


@dataclass
class Server:
    url: str
    folder: Path
    asked: Counter[str] = field(default_factory=Counter)
    failing: int = 0
    """How many of the next requests for a tar are answered by an error."""
    status: int = 503
    retry_after: str | None = None
    dripping: bool = False
    """Send a tar's first bytes one by one, forever."""
    ended: threading.Event = field(default_factory=threading.Event)
    silent: bool = False
    """Take requests for a tar and answer none."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "served"
    write_shards(folder / "train", 12, 3)
    monkeypatch.setenv("LIT_SAFETY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAIT", 0.01)
    state = Server("", folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if not self.stumbles():
                super().do_HEAD()

        def do_GET(self) -> None:
            state.asked[self.path.rsplit("/", 1)[-1]] += 1
            if not self.stumbles(counted=True):
                super().do_GET()

        def stumbles(self, counted: bool = False) -> bool:
            if not self.path.endswith(".tar"):
                return False
            if state.silent:
                state.ended.wait(30)
                return True
            if state.dripping:
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while counted and not state.ended.wait(0.05):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                return True
            if not state.failing:
                return False
            state.failing -= counted  # a HEAD is answered by the same error and not counted
            self.send_response(state.status)
            if state.retry_after is not None:
                self.send_header("Retry-After", state.retry_after)
            self.end_headers()
            return True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as running:
        state.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield state
        state.ended.set()
        running.shutdown()


def passes(given: str, times: int = 1, **options: Any) -> list[list[str]]:
    data = PreferenceDataModule(given, **{"batch_size": 4, **options})
    data.setup()
    loader = data.train_dataloader()
    return [[key for batch in loader for key in batch.keys] for _ in range(times)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_a_local_copy_and_each_shard_is_fetched_once(server: Server, workers: int) -> None:
    assert passes(f"{server.url}/train/", 2, num_workers=workers) == passes(str(server.folder / "train"), 2)
    assert {name: times for name, times in server.asked.items() if name.endswith(".tar")} == {
        f"shard-00000{number}.tar": 1 for number in range(4)
    }


def test_a_server_that_stumbles_is_asked_again(server: Server) -> None:
    server.failing = 2
    assert len(passes(f"{server.url}/train")[0]) == 12


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [("missing", "is not there"), ("changed", "its SHA-256 differs"), ("failing", "503")],
)
def test_a_shard_that_cannot_be_had_is_named(server: Server, tmp_path: Path, damage: str, complaint: str) -> None:
    shard = server.folder / "train" / "shard-000002.tar"
    if damage == "missing":
        shard.unlink()
    elif damage == "changed":
        shard.write_bytes(shard.read_bytes().replace(b"prompt 6", b"prompt 9"))
    else:
        server.failing = 100
    with pytest.raises(UserError, match=complaint):
        passes(f"{server.url}/train", num_workers=1)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith("shard-000002")]
    if damage != "failing":
        (left,) = passes(f"{server.url}/train", on_bad_sample="skip")
        assert {f"{number:05d}" for number in range(12)} - set(left) <= {"00006", "00007", "00008"}


def test_what_is_no_folder_of_shards_is_named(server: Server) -> None:
    with pytest.raises(
        UserError, match=r"data\.init_args\.train: http.*none/manifest\.json: is not there; give a folder"
    ):
        passes(f"{server.url}/none")
    with pytest.raises(UserError, match="give the folder that holds manifest"):
        passes(f"{server.url}/train/shard-000000.tar")
    with pytest.raises(UserError, match=r"nothing://x/manifest\.json: cannot be read"):
        passes("nothing://x")


def test_an_object_store(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(server.folder / "train"), "/bucket/train", recursive=True)
    assert passes("memory://bucket/train") == passes(str(server.folder / "train"))
    inspect("memory://bucket/train", samples=1)
    assert "12 pairs in 4 shards" in capsys.readouterr().out


# ---- servers that are busy, slow or never end


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_whatever_it_is_asked_for(server: Server, tmp_path: Path, status: int) -> None:
    """HEAD and GET are both refused, as proxies do; fsspec calls that "not found"."""
    server.failing, server.status = 2, status
    url = f"{server.url}/train/shard-000000.tar"
    assert fetch(url, tmp_path / "kept").read_bytes() == (server.folder / "train" / "shard-000000.tar").read_bytes()


def test_what_a_server_asks_to_wait_is_waited_within_bounds(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        server.failing = 0

    monkeypatch.setattr(remote.time, "sleep", sleep)
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    for stated, expected in (("7", 7.0), ("86400", 30.0), (later, 19.0), ("-5", 0.01), ("soon", 0.01)):
        server.failing, server.status, server.retry_after = 9, 429, stated
        fetch(f"{server.url}/train/shard-000000.tar", tmp_path / "kept", fresh=True)
        assert slept[-1] == pytest.approx(expected, abs=2.0 if stated == later else 1e-6)


@pytest.mark.parametrize(("status", "times"), [(403, 1), (401, 1), (500, remote.ATTEMPTS), (429, remote.ATTEMPTS)])
def test_the_status_is_named_and_what_time_cannot_mend_is_not_tried_again(
    server: Server, tmp_path: Path, status: int, times: int
) -> None:
    server.failing, server.status = 1000, status
    with pytest.raises(UserError, match=rf"shard-000001\.tar: cannot be fetched.*{status}"):
        fetch(f"{server.url}/train/shard-000001.tar", tmp_path / "kept")
    assert server.failing <= 1000 - times
    assert not list((tmp_path / "kept").rglob("*.arrived"))


def test_a_server_that_is_not_there_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.0)
    with pytest.raises(UserError, match="cannot be fetched, tried 5 times"):
        fetch("http://127.0.0.1:9/shard.tar", tmp_path)


@pytest.mark.parametrize("how", ["dripping", "silent"])
def test_a_server_that_never_ends_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(remote, "SPELL", 0.5)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    setattr(server, how, True)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"shard-000001\.tar: .*within 0\.5 seconds"):
        fetch(f"{server.url}/train/shard-000001.tar", tmp_path / "kept")
    assert time.monotonic() - begun < 5


def test_what_a_killed_process_left_is_removed(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/train/shard-000001.tar"
    path = fetch(url, tmp_path / "kept")
    (path.parent / f".{path.name}.0123.arrived").write_bytes(b"half")
    fetch(url, tmp_path / "kept", fresh=True)
    assert not list(path.parent.glob(".*.arrived"))


def test_more_bytes_than_the_manifest_states_are_not_kept(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/train/shard-000001.tar"
    size = (server.folder / "train" / "shard-000001.tar").stat().st_size
    for stated in (size - 1, size + 1):
        with pytest.raises(UserError, match=rf"shard-000001\.tar: .*{stated}"):
            fetch(url, tmp_path / "kept", size=stated)
    assert fetch(url, tmp_path / "kept", size=size).stat().st_size == size


# ---- shards without a hash


def hashless(server: Server) -> Path:
    path = server.folder / "train" / "manifest.json"
    stated = json.loads(path.read_text())
    for one in stated["shardlist"]:
        one.pop("sha256")
        one.pop("bytes")
    path.write_text(json.dumps(stated))
    return server.folder / "train" / "shard-000001.tar"


def later_run() -> None:
    """Every process asks once."""
    remote._NEWEST.clear()


def test_a_shard_without_a_hash_is_fetched_again_when_the_server_s_is_another(server: Server) -> None:
    shard = hashless(server)
    first = sorted(passes(f"{server.url}/train")[0])
    later_run()
    assert sorted(passes(f"{server.url}/train")[0]) == first
    assert server.asked[shard.name] == 1  # kept: the server says that it did not change
    with ShardWriter(server.folder / "other") as writer:  # of the same size, other keys
        for number in (23, 24, 25):
            writer.write(f"{number:05d}", metadata(number), make_image(number), make_image(number + 100))
    size = shard.stat().st_size
    os.replace(server.folder / "other" / "shard-000000.tar", shard)
    os.utime(shard, (1e9, 1e9))
    assert shard.stat().st_size == size
    later_run()
    manifest = server.folder / "train" / "manifest.json"
    stated = json.loads(manifest.read_text())
    for one in stated["shardlist"]:
        one.pop("classes", None)
    manifest.write_text(json.dumps(stated))
    assert {"00023", "00024", "00025"} < set(passes(f"{server.url}/train")[0])
    assert server.asked[shard.name] == 2


def test_an_earlier_copy_is_used_with_a_word_when_the_server_is_gone(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{server.url}/train/shard-000001.tar"
    first = fetch(url, tmp_path / "kept").read_bytes()
    later_run()
    server.failing, server.status = 1000, 500
    assert fetch(url, tmp_path / "kept").read_bytes() == first
    assert url in caplog.text


def test_a_store_that_says_nothing_of_changes_is_named(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/train/shard-000001.tar"
    monkeypatch.setattr(remote, "_asked", lambda _: {"size": str(path.stat().st_size)})
    path = fetch(url, tmp_path / "kept")
    later_run()
    assert fetch(url, tmp_path / "kept") == path
    assert f"{url}: neither the manifest (SHA-256)" in caplog.text


def test_without_a_home_shards_are_kept_among_the_temporary_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LIT_SAFETY_CACHE")
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr("lit_safety.core.hashes.tempfile.gettempdir", lambda: str(tmp_path))
    assert len(passes(f"{server.url}/train")[0]) == 12
    monkeypatch.setenv("LIT_SAFETY_CACHE", "/dev/null/x")
    with pytest.raises(UserError, match="LIT_SAFETY_CACHE"):
        passes(f"{server.url}/train")


def without_hashes(folder: Path) -> None:
    path = folder / "manifest.json"
    stated = json.loads(path.read_text())
    for shard in stated["shardlist"]:
        del shard["sha256"], shard["bytes"]
    path.write_text(json.dumps(stated))


@pytest.mark.parametrize("status", [204, 206])
def test_an_answer_that_is_not_the_whole_file_is_refused_without_a_hash_too(server: Server, status: int) -> None:
    without_hashes(server.folder / "train")
    server.failing, server.status = 99, status
    with pytest.raises(UserError, match=rf"^http.*shard-00000\d\.tar: the server answers {status}"):
        passes(f"{server.url}/train")
    server.failing = 0
    assert len(passes(f"{server.url}/train")[0]) == 12


def test_a_page_instead_of_a_shard_is_reported_by_its_url_and_not_kept(server: Server, tmp_path: Path) -> None:
    without_hashes(server.folder / "train")
    shard = server.folder / "train" / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"<html>log in</html>")
    with pytest.raises(UserError, match=r"^http.*shard-000001\.tar: .*no"):
        passes(f"{server.url}/train")
    assert not list((tmp_path / "cache").rglob("shard-000001.tar"))
    shard.write_bytes(whole)
    assert len(passes(f"{server.url}/train")[0]) == 12


def test_why_a_store_fails_is_one_line() -> None:
    assert remote._reason("s3://a/b", OSError("400, message:\n  too little")) == "400, message: too little"


def test_a_server_that_sends_on_without_end_is_reported(server: Server) -> None:
    class Redirected(OSError):
        status = 0

    with pytest.raises(UserError, match=r"s3://a/b: .*without end"):
        remote._reason("s3://a/b", Redirected())
