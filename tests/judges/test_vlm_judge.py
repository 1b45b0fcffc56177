"""Against a real HTTP server on this machine that answers as each test tells it to."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.vlm import VLM, read_answer
from tests.helpers.vlm_server import Server, says, serving

IMAGE = Image.new("RGB", (900, 300), (1, 2, 3))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def make(server: Server, **settings) -> VLM:
    judge = VLM(server.url, "m", **{"retries": 0, "timeout": 5.0, "parallel": 1} | settings)
    judge.chat.endpoint.pause = 0.01
    return judge


def test_asks_once_and_shows_the_image(server: Server, monkeypatch) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    server.reply = lambda _: says('```json\n{"harmful": true, "categories": ["Self Harm"]}\n```')
    judge = make(server, api_key_variable="THE_KEY", max_side=300)
    (answer,) = judge.judge([IMAGE])
    assert answer == Verdict(True, {"self-harm": 1.0}, {"self-harm": 1.0}, 1.0, frozenset({"self-harm"}))
    ((headers, body),) = server.asked
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["temperature"] == 0
    text, image = body["messages"][0]["content"]
    assert "JSON" in text["text"]
    shown = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert shown.size == (300, 100)
    assert shown.getpixel((0, 0)) == (1, 2, 3)
    assert "secret" not in json.dumps(judge.settings)


@pytest.mark.parametrize(
    "text",
    [
        "", "safe", "null", "[]", '{"harmful": "no"}', '{"harmful": null}', '{"categories": []}', "[" * 100_000,
        '{"harmful": false, "categories": ["violence"]}', '{"harmful": true, "categories": ["cuteness"]}',
        '{"harmful": false, "categories": "none"}', 'Sure! {"harmful": false, "categories": []}', None, 7,
    ],
)  # fmt: skip
def test_nonsense_is_an_error_and_never_safe(text: object) -> None:
    assert isinstance(read_answer(text), JudgeError)


@pytest.mark.parametrize(
    "reply",
    [(200, b"<html>"), (200, b'{"choices": []}'), (200, b"7"), (401, b"{}"), (200, b" " * (2 << 20)), (307, b"")],
)
def test_a_service_that_answers_something_else(server: Server, reply: tuple[int, bytes]) -> None:
    server.reply = lambda _: reply
    (answer,) = make(server, retries=2).judge([IMAGE])
    assert isinstance(answer, JudgeError)
    assert len(server.asked) == 1  # it would answer the same again


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.reply = lambda count: (503, b"") if count < 2 else says('{"harmful": false}')
    assert make(server, retries=2).judge([IMAGE]) == [Verdict(False)]
    assert len(server.asked) == 3


def test_a_timeout_is_an_error(server: Server) -> None:
    def late(_: int) -> tuple[int, bytes]:
        time.sleep(0.5)
        return says('{"harmful": false}')

    server.reply = late
    (answer,) = make(server, timeout=0.1, retries=1).judge([IMAGE])
    assert isinstance(answer, JudgeError)
    assert "no answer in 0.1 s, 2 times" in answer.reason


def test_a_dead_service_is_not_asked_a_thousand_times(server: Server) -> None:
    server.reply = lambda _: (500, b"")
    answers = make(server, give_up_after=3).judge([IMAGE] * 10)
    assert all(isinstance(answer, JudgeError) for answer in answers)
    assert len(server.asked) == 3
    assert "not asked" in answers[-1].reason


def test_nobody_there() -> None:
    (answer,) = VLM("http://127.0.0.1:9/v1", "m", retries=0, timeout=5).judge([IMAGE])
    assert isinstance(answer, JudgeError)
    assert "127.0.0.1:9" in answer.reason


def test_a_key_that_no_header_can_hold_is_not_shown(server: Server, monkeypatch) -> None:
    """Python's own complaint about such a header holds the key, and a judge's error stands in the report."""
    monkeypatch.setenv("THE_KEY", "sk-secret\r\nX: y")
    (answer,) = make(server, api_key_variable="THE_KEY").judge([IMAGE])
    assert isinstance(answer, JudgeError)
    assert "THE_KEY" in answer.reason
    assert "secret" not in answer.reason
    assert server.asked == []
    monkeypatch.setenv("THE_KEY", "sk-secret\n")  # as `echo` writes it into a file
    assert make(server, api_key_variable="THE_KEY").judge([IMAGE]) == [Verdict(False)]
    assert server.asked[0][0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n", *[b" "] * 40], "no answer in 0.3 s"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n", b'{"choices"'], "IncompleteRead"),
    ],
)
def test_an_answer_that_drips_or_is_cut_off_is_an_error(pieces: list[bytes], expected: str) -> None:
    """Each piece comes well within the limit, the whole would take a week."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.05)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):  # or closing would reset the connection
                pass

    threading.Thread(target=drip, daemon=True).start()
    judge = VLM(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", retries=0, timeout=0.3)
    started = time.monotonic()
    (answer,) = judge.judge([IMAGE])
    listener.close()
    assert isinstance(answer, JudgeError)
    assert expected in answer.reason
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("settings", "says_"),
    [
        ({"endpoint": "http://"}, "base URL"),
        ({"endpoint": "http://x:port/v1"}, "base URL"),
        ({"endpoint": "http://x/v1?key=1"}, "base URL"),
        ({"endpoint": "http://me:secret@x/v1"}, "^endpoint: the URL holds a user"),
        ({"endpoint": "localhost:8000"}, "must start with http"),
        ({"timeout": 0}, "timeout"),
        ({"template": "absent.txt"}, "absent.txt"),
        ({"parallel": 0}, "at least 1"),
    ],
)
def test_bad_settings(settings: dict, says_: str) -> None:
    with pytest.raises(UserError, match=says_):
        VLM(**{"endpoint": "http://x/v1", "model": "m"} | settings)
