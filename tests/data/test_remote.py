"""Shards over http from a server on this machine, and out of an fsspec store."""

from __future__ import annotations

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pair_shards import write_shards

from lit_safety.data import PreferenceDataModule
from lit_safety.data.inspect import inspect
from lit_safety.errors import UserError


@dataclass
class Server:
    url: str
    folder: Path
    asked: Counter[str] = field(default_factory=Counter)
    failing: int = 0
    """How many of the next requests for a tar are answered by an error."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "served"
    write_shards(folder / "train", 12, 3)
    monkeypatch.setenv("LIT_SAFETY_CACHE", str(tmp_path / "cache"))
    state = Server("", folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked[self.path.rsplit("/", 1)[-1]] += 1
            if self.path.endswith(".tar") and state.failing:
                state.failing -= 1
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as running:
        state.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield state
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
    [("missing", "is not there"), ("changed", "its SHA-256 differs"), ("failing", "cannot be fetched, tried 3 times")],
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
    with pytest.raises(UserError, match="over the network give the folder"):
        passes(f"{server.url}/train/shard-000000.tar")
    with pytest.raises(UserError, match=r"nothing://x/manifest\.json: cannot be read"):
        passes("nothing://x")


def test_an_object_store(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(server.folder / "train"), "/bucket/train", recursive=True)
    assert passes("memory://bucket/train") == passes(str(server.folder / "train"))
    inspect("memory://bucket/train", samples=1)
    assert "12 pairs in 4 shards" in capsys.readouterr().out
