"""Prompts asked of a small HTTP server on this machine, which answers well, badly, late or not at all."""

from __future__ import annotations

import csv
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.generation.pairs import read_prompt_pairs
from lit_safety.generation.write_prompts import write_prompts


@dataclass
class Server:
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)
    """What the next requests get: a status, seconds to wait, a text; None: a good answer. Then good answers."""
    raw: bytes | None = None
    """The whole body, instead of a chat answer."""
    written: int = 0

    def good(self, question: str) -> str:
        """As many prompts as are asked for, all new; the counterparts number by number."""
        if "unsafe_prompts" in question:
            count = int(re.search(r"Write (\d+) prompts", question)[1])  # type: ignore[index]
            self.written += count
            return json.dumps({"unsafe_prompts": [f"bad {self.written - n}" for n in range(count)]})
        numbered = re.findall(r"^\d+\. bad (\d+)$", question, re.MULTILINE)
        return json.dumps({"safe_prompts": [f"good {number}" for number in numbered]})


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append({"path": self.path, **body})
            state.keys.append(self.headers.get("Authorization"))
            step = state.script.pop(0) if state.script else None
            if isinstance(step, float):
                time.sleep(step)
            if isinstance(step, int):
                self.send_response(step)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                return
            text = step if isinstance(step, str) else state.good(body["messages"][0]["content"])
            answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            data = json.dumps(answer).encode() if state.raw is None else state.raw
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the one who asked did not wait
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.url = f"http://127.0.0.1:{running.server_port}/v1"
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield state
        running.shutdown()


@pytest.fixture
def ask(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, str]]]:
    """Run the command for two concepts; gives the table's rows."""
    from lit_safety.core import http as endpoint

    monkeypatch.setattr(endpoint, "MAX_WAIT", 0.01)
    (tmp_path / "concepts.csv").write_text("category,concept\nViolence,gun\nHarrasment,  angry   crowd\nviolence,gun\n")

    def run(**options: Any) -> list[dict[str, str]]:
        given = {"url": server.url, "model": "m", "per_concept": 4, "per_question": 3, "attempts": 3, **options}
        write_prompts(str(tmp_path / "concepts.csv"), str(tmp_path / "prompts.csv"), **given)
        with open(tmp_path / "prompts.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_each_unsafe_prompt_has_its_counterpart(
    server: Server, ask: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    rows = ask()
    assert [(row["category"], row["concept"]) for row in rows] == [("violence", "gun")] * 4 + [
        ("harassment", "angry crowd")
    ] * 4
    assert len({row["harmful_prompt"] for row in rows}) == 8
    assert all(row["harmful_prompt"].split()[1] == row["safe_prompt"].split()[1] for row in rows)
    assert len(read_prompt_pairs(str(tmp_path / "prompts.csv"), 0)[0]) == 8  # `generate` reads it
    # 4 wanted, 3 a question: 3 and then 1, two questions each, for two concepts
    assert [one["path"] for one in server.asked] == ["/v1/chat/completions"] * 8
    assert 'the concept "angry crowd" of the harm category\n"harassment"' in server.asked[4]["messages"][0]["content"]
    assert "bad 3" in server.asked[2]["messages"][0]["content"]  # what exists already is said
    assert server.keys == [None] * 8


def test_the_key_comes_from_the_environment_and_stays_out_of_the_files(
    server: Server, ask: Callable[..., list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    ask(key_variable="MY_KEY")
    assert set(server.keys) == {"Bearer secret"}
    assert not [path for path in tmp_path.iterdir() if "secret" in path.read_text()]


NONSENSE = [
    "I cannot help with that.",
    "[]",
    '{"unsafe_prompts": "one"}',
    '{"unsafe_prompts": []}',
    '{"unsafe_prompts": ["a", "b", "c", "d"]}',
    '{"unsafe_prompts": ["a", 3]}',
    '{"unsafe_prompts": ["a", " "]}',
    '{"unsafe_prompts": ["a"], "safe_prompts": ["b"]}',
    json.dumps({"unsafe_prompts": ["x" * 401]}),
    '{"unsafe_prompts": ["\\ud800"]}',
    '{"unsafe_prompts": ["a"]} and more',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_an_answer_of_another_shape_is_asked_again(
    server: Server, ask: Callable[..., list[dict[str, str]]], text: str
) -> None:
    server.script = [text]
    assert len(ask()) == 8
    assert len(server.asked) == 9
    assert server.asked[0]["seed"] != server.asked[1]["seed"]  # asked the same again, it would answer the same


def test_counterparts_must_be_as_many(server: Server, ask: Callable[..., list[dict[str, str]]]) -> None:
    server.script = [None, '{"safe_prompts": ["one", "two"]}']
    assert len(ask()) == 8
    assert len(server.asked) == 9


def test_a_fence_round_the_json_is_borne(server: Server, ask: Callable[..., list[dict[str, str]]]) -> None:
    server.script = ['```json\n{"unsafe_prompts": ["bad 71", "bad  72", "bad\\n73"]}\n```']
    assert [row["harmful_prompt"] for row in ask()[:3]] == ["bad 71", "bad 72", "bad 73"]


def test_what_stays_nonsense_is_counted_and_the_next_concept_is_asked(
    server: Server, ask: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = ["no"] * 15  # three attempts in each of five rounds
    rows = ask()
    assert {row["concept"] for row in rows} == {"angry crowd"}
    text = capsys.readouterr().out
    assert (
        "violence, gun: left out an answer that cannot be used: after 3 attempts the answer still is not JSON" in text
    )
    assert "5 answers" in text
    assert "1 concepts have fewer than 4" in text


def test_repeated_prompts_are_written_once(server: Server, ask: Callable[..., list[dict[str, str]]]) -> None:
    server.script = [
        '{"unsafe_prompts": ["bad 1", "Bad 1.", "bad 2"]}',
        '{"safe_prompts": ["good 1", "good 1", "bad, 2"]}',  # the third is not a counterpart
    ]
    server.written = 50
    rows = ask()
    assert [row["harmful_prompt"] for row in rows[:4]] == ["bad 1", "bad 53", "bad 52", "bad 51"]
    assert len(rows) == 8


@pytest.mark.parametrize("trouble", [500, 503, 429, 1.5])
def test_a_server_that_fails_or_sleeps_is_asked_again(
    server: Server, ask: Callable[..., list[dict[str, str]]], trouble: int | float
) -> None:
    server.script = [trouble, trouble]
    assert len(ask(timeout=0.5 if trouble == 1.5 else 20.0)) == 8


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [(500, "asked 3 times .HTTP 500"), (401, "refuses the question .HTTP 401.*--key_variable"),
     (404, "HTTP 404.*check --url and --model"), (302, "HTTP 302"), (1.5, "asked 3 times")],
)  # fmt: skip
def test_a_server_that_does_not_answer_stops_the_run_which_goes_on_later(
    server: Server, ask: Callable[..., list[dict[str, str]]], tmp_path: Path, trouble: int | float, complaint: str
) -> None:
    server.script = [None, None, trouble, trouble, trouble]
    with pytest.raises(UserError, match=complaint) as caught:
        ask(timeout=0.5 if trouble == 1.5 else 20.0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "prompts.csv").exists()
    server.script, before = [], len(server.asked)
    assert len(ask()) == 8
    assert len(server.asked) == before + 6  # the first round is not asked again


def test_nobody_listens(ask: Callable[..., list[dict[str, str]]]) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1: does not answer, asked 3 times"):
        ask(url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="must start with http"):
        ask(url="file:///etc/passwd")


@pytest.mark.parametrize("raw", [b"<html>", b"{}", b'{"choices": []}', b"\xff", b'{"choices": [{"message": {}}]}'])
def test_what_is_no_chat_answer_is_of_no_use(
    server: Server, ask: Callable[..., list[dict[str, str]]], raw: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    server.raw = raw
    with pytest.raises(UserError, match="0 pairs"):
        ask(attempts=1)
    assert "the server's answer is not a chat answer" in capsys.readouterr().out


def test_more_can_be_asked_for_later_and_other_questions_cannot(
    server: Server, ask: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    first = ask(per_concept=2)
    log = tmp_path / "prompts.csv.answers.jsonl"
    log.write_text(log.read_text() + '{"category": "viol')  # a kill in the middle of a line
    server.asked.clear()
    more = ask(per_concept=4)
    assert [row for row in more if row in first] == first
    assert len(server.asked) == 4
    with pytest.raises(UserError, match="another model"):
        ask(model="other")
    assert len(ask(model="other", overwrite=True)) == 8


def test_templates_of_ones_own(server: Server, ask: Callable[..., list[dict[str, str]]], tmp_path: Path) -> None:
    (tmp_path / "unsafe_prompts.txt").write_text("Write $count prompts: $concept $category $known unsafe_prompts")
    with pytest.raises(UserError, match=r"safe_prompts\.txt: cannot be read"):
        ask(templates=str(tmp_path))
    (tmp_path / "safe_prompts.txt").write_text("$count $concept $category\n$prompts\n$more")
    with pytest.raises(UserError, match=r"\$category, \$concept, \$count, \$prompts"):
        ask(templates=str(tmp_path))
    (tmp_path / "safe_prompts.txt").write_text("$count $concept $category\n$prompts\n")
    assert len(ask(templates=str(tmp_path))) == 8
    assert server.asked[0]["messages"][0]["content"].startswith("Write 3 prompts: gun violence (none yet)")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("category,concept\nfun,gun\n", "row 2: unknown category 'fun'"),
        ("category,concept\nhate,\n", "row 2: the concept is empty"),
        ("category,concept\n", "0 concepts"),
        ("category\nhate\n", "has no column 'concept'"),
    ],
)
def test_wrong_concepts_are_named(
    ask: Callable[..., list[dict[str, str]]], tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "concepts.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        ask()


@pytest.mark.parametrize("url", ["http://[::1", "http://", "http://host:99999/v1", "http://a host/v1", "ftp://host"])
def test_what_is_no_url_is_said_at_once(ask: Callable[..., list[dict[str, str]]], url: str) -> None:
    with pytest.raises(UserError, match="--url"):
        ask(url=url)


def test_a_key_that_no_header_can_hold_is_not_shown(
    ask: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nother")
    with pytest.raises(UserError, match="the environment variable OPENAI_API_KEY") as caught:
        ask()
    assert "secret" not in str(caught.value)
