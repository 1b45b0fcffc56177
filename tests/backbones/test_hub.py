"""The hub, played by a server on this machine: what it refuses, what it does not have, and when it is not there."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lit_safety.backbones import hub, load_backbone
from lit_safety.backbones.load import family_of
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.pipelines import load_pipeline, local_pipeline

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As if the hub might be asked, with a cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub._answers.cache_clear()
    hub._listing.cache_clear()
    yield monkeypatch
    hub._answers.cache_clear()
    hub._listing.cache_clear()


@pytest.fixture
def server(online: pytest.MonkeyPatch, tiny_pipeline: Path) -> Iterator[list[str]]:
    """A hub with the models lit/tiny and lit/gated; yields the files it was asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/lit/tiny/tree/{COMMIT}"):
                files = [one.relative_to(tiny_pipeline).as_posix() for one in tiny_pipeline.rglob("*") if one.is_file()]
                files += ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"]
                listed = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
                self.send(200, json.dumps(listed).encode(), body)
            elif path.startswith("/lit/tiny/resolve/"):
                name = path.split("/", 5)[5]
                file = tiny_pipeline / name
                asked.append(name)
                if not file.is_file():
                    self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                else:
                    self.send(200, file.read_bytes(), body, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
            elif path.startswith("/lit/gated/"):
                self.send(403, b"", body, {"X-Error-Code": "GatedRepo"})
            elif path == "/":
                self.send(200, b"", body)
            else:
                self.send(401, b"", body, {"X-Error-Code": "RepoNotFound"})

        def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Silent."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    online.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    yield asked
    running.shutdown()


def test_only_what_is_used_is_fetched(server: list[str]):
    """A text encoder alone: neither the UNet's weights nor any in half precision or another format."""
    backbone = load_backbone("lit/tiny", denoiser=False)
    assert set(server) == {"model_index.json", "scheduler/scheduler_config.json", "vae/config.json"}
    backbone.part("text_encoder")
    assert set(server) >= {"text_encoder/config.json", "text_encoder/model.safetensors"}
    folder = backbone.parts.fetch()
    assert "unet/diffusion_pytorch_model.safetensors" in server
    assert not any(name.endswith((".bin", ".fp16.safetensors")) for name in server)
    assert family_of(str(folder)) is type(backbone)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "lit/gated",
            [
                "lit/gated is gated",
                "accept its licence at http://127.0.0.1",
                "/lit/gated,",
                "hf auth login",
                "local folder",
            ],
        ),
        ("lit/missing", ["no folder 'lit/missing'", "no such model", "hf auth login", "local folder"]),
        ("not/a/hub/id", ["no folder 'not/a/hub/id'", "hub id either"]),
    ],
)
def test_what_the_hub_refuses(server: list[str], model: str, words: list[str]):
    with pytest.raises(UserError) as refused:
        load_backbone(model)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_a_hub_that_swallows_packets_is_given_up(online: pytest.MonkeyPatch):
    """A server that takes connections and never says a word; the libraries alone would try 6 times for 10 seconds
    each, for every file."""
    online.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        for _ in range(3):
            with pytest.raises(UserError, match=r"hub"):
                load_backbone("lit/tiny")
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("endpoint", ["http://nowhere.invalid", "no URL", "http://\u2603"])
def test_a_hub_that_cannot_be_asked_is_one_line(online: pytest.MonkeyPatch, endpoint: str):
    """A host that does not exist, and an HF_ENDPOINT that is not an address."""
    online.setattr(hub, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match=r"lit/tiny.*does not answer") as refused:
        load_backbone("lit/tiny")
    assert "\n" not in str(refused.value)


def test_in_offline_mode_nothing_is_asked(server: list[str], online: pytest.MonkeyPatch):
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"lit/tiny.*HF_HUB_OFFLINE"):
        load_backbone("lit/tiny")
    online.setattr(constants, "HF_HUB_OFFLINE", False)
    load_backbone("lit/tiny", denoiser=False).part("text_encoder")
    fetched = list(server)
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    load_backbone("lit/tiny", denoiser=False).part("text_encoder")
    assert server == fetched


def test_what_was_fetched_before_serves_without_the_hub(server: list[str], online: pytest.MonkeyPatch):
    load_backbone("lit/tiny", denoiser=False).part("text_encoder")
    online.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    backbone = load_backbone("lit/tiny", denoiser=False)
    backbone.part("text_encoder")
    with pytest.raises(UserError, match="tokenizer"):
        backbone.part("tokenizer")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # Of the hub's own way of fetching, which is not Python.
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
    ],
)
def test_no_space_says_where(server: list[str], online: pytest.MonkeyPatch, error: Exception):
    def full(*args: Any, **options: Any) -> str:
        raise error

    online.setattr(hub, "hf_hub_download", full)
    with pytest.raises(UserError, match=r"model_index.json in .*HF_HOME"):
        load_backbone("lit/tiny")


def test_a_connection_that_breaks_is_reported(server: list[str], online: pytest.MonkeyPatch):
    """A weights file whose answer ends too soon, after the client's own tries; its error is of no kind of Python's."""
    fetch = hub.hf_hub_download

    def broken(source: str, name: str, **options: Any) -> str:
        if name.endswith(".safetensors"):
            raise hub.HTTPError("peer closed connection without sending complete message body")
        return fetch(source, name, **options)

    online.setattr(hub, "hf_hub_download", broken)
    with pytest.raises(UserError, match=r"model.safetensors.*peer closed"):
        load_backbone("lit/tiny", denoiser=False).part("text_encoder")
    assert not issubclass(hub.HTTPError, OSError | RuntimeError)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_offline_cache_without_a_tokenizers_file_is_refused_by_its_name(
    server: list[str], online: pytest.MonkeyPatch, name: str
):
    """Of a fetch that was stopped: transformers would make a tokenizer of two words of what is there."""
    folder = load_backbone("lit/tiny").parts.fetch()
    (folder / "tokenizer" / name).unlink()
    online.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for reading in (load_backbone, lambda source: load_pipeline(local_pipeline(source), Arm())):
        with pytest.raises(UserError, match=rf"tokenizer/{name.replace('.', '[.]')} is missing"):
            reading("lit/tiny")
