"""Prompts written by a language model, in rounds of questions over HTTP.

The model runs on a local server (vLLM, llama.cpp, Ollama, ...) or a remote one. Its answers are read strictly: JSON of
the shape that was asked for, or nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.files import append_line, write_atomic
from lit_safety.core.hashes import digest
from lit_safety.core.http import AGAIN, AnswerError, Endpoint, EndpointError, unfenced
from lit_safety.core.text import decode_text, load_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from string import Template


@dataclass(frozen=True)
class ChatModel:
    """A language model behind an OpenAI-compatible chat endpoint.

    Args:
        url: base URL of the API, such as http://localhost:8000/v1.
        model: the model's name there.
        key_variable: environment variable that holds the API key; without it no key is sent.
        timeout: seconds to wait for an answer.
        attempts: how often a question is asked when the server fails, waiting longer each time.
        wait: seconds before the second attempt; doubled before each further one, up to a minute.

    Raises:
        UserError: the URL is not http(s), or a number is out of its range.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 1.0
    max_tokens: int = 2048
    timeout: float = 120.0
    attempts: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        for name in ("timeout", "attempts", "max_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be above 0, not {getattr(self, name)}")
        try:
            self._endpoint().key()
        except UserError as error:
            raise UserError(f"--url: {error}") from error
        except EndpointError as error:
            raise UserError(str(error)) from error

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.key_variable, self.timeout, self.attempts - 1, self.wait)

    def ask(self, question: str, seed: int) -> str:
        """The text of the answer.

        Raises:
            AnswerError: the answer is not a chat answer.
            UserError: the server refuses, or fails at every attempt.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        try:
            return self._endpoint().chat(body)
        except AnswerError as error:
            raise AnswerError(f"the server's answer is not a chat answer ({error})") from error
        except EndpointError as error:
            why = str(error) if error.status is None else f"HTTP {error.status}"
            if error.status is not None and error.status not in AGAIN:
                raise UserError(f"{self.url}: refuses the question ({why}){_hint(error.status)}") from error
            raise UserError(
                f"{self.url}: does not answer, asked {self.attempts} times ({why}); earlier answers are kept"
            ) from error


def _hint(code: int) -> str:
    if code in (401, 403):
        return "; set the API key's environment variable (--key_variable)"
    return "; check --url and --model" if code in (301, 302, 307, 308, 404) else ""


MAX_PROMPT = 400


def parse_prompts(text: str, name: str, least: int, most: int) -> list[str]:
    """The prompts in `{"NAME": ["...", ...]}`, which may be in a code block of three backticks.

    Args:
        text: the answer.
        name: the only key.
        least: fewer prompts are an error.
        most: the number of prompts asked for; more are an error.

    Raises:
        AnswerError: it has another form; says which.
    """
    try:
        answer = load_json(unfenced(text))
    except ValueError as error:
        raise AnswerError(f"is not JSON ({error}): {text[:80]!r}") from error
    if not isinstance(answer, dict) or set(answer) != {name} or not isinstance(answer[name], list):
        raise AnswerError(f"is not an object with one list {name!r}: {text[:80]!r}")
    if not least <= len(answer[name]) <= most:
        raise AnswerError(f"holds {len(answer[name])} prompts, not {least if least == most else f'{least} to {most}'}")
    return [_prompt(one) for one in answer[name]]


def _prompt(one: object) -> str:
    if not isinstance(one, str) or not one.strip():
        raise AnswerError(f"holds {one!r}, which is not a prompt")
    prompt = " ".join(one.split())
    if len(prompt) > MAX_PROMPT:
        raise AnswerError(
            f"holds a prompt of {len(prompt)} letters, more than the limit of {MAX_PROMPT}: {prompt[:60]!r}"
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AnswerError("holds a prompt with a broken character") from error
    return prompt


def same(prompt: str) -> str:
    """Equal for prompts that differ only in case, blanks and punctuation."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def numbered(prompts: Sequence[str]) -> str:
    """The prompts, numbered for a question."""
    return "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, start=1)) or "(none yet)"


# The answers of a language model, one a line, appended as they arrive, so that no question is paid for twice.


@dataclass(frozen=True)
class Round:
    """The result of one round of questions about a concept."""

    category: str
    concept: str
    pairs: list[tuple[str, str]]
    """(unsafe, safe) prompts; empty if the answers could not be used."""
    problem: str | None = None
    """Why the answers could not be used."""


class AnswerLog:
    """The rounds of a run in an append-only JSONL file, whose first line holds the run's settings.

    Args:
        path: the file.
        settings: what the answers depend on; can be written as JSON.
        overwrite: delete earlier answers.

    Raises:
        UserError: the file holds answers to other questions.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.rounds: list[Round] = []
        head = json.dumps({"run": digest(dict(settings)), **settings}, ensure_ascii=False).encode() + b"\n"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() and not overwrite else []
        if lines and lines[0] != head:
            raise UserError(
                f"{path}: holds answers of another model or to other questions; name another file with --out, or "
                "delete them with --overwrite true"
            )
        whole = head
        for line in lines[1:]:
            try:
                noted = load_json(line)
                self.rounds.append(Round(**{**noted, "pairs": [(str(a), str(b)) for a, b in noted["pairs"]]}))
            except (ValueError, KeyError, TypeError):
                break  # a kill cut the line short
            whole += line
        write_atomic(path, whole)

    def add(self, one: Round) -> None:
        """Note a round."""
        self.rounds.append(one)
        append_line(self.path, json.dumps(asdict(one), ensure_ascii=False))


# `lit_safety shards write-prompts`: a language model writes unsafe prompts and their safe counterparts, per concept.
#
# Similar to CoProV2 (arXiv 2412.10493). The purpose is data that teaches a model what it must not draw. The questions
# in `templates/` state this purpose.


QUESTIONS = ("unsafe_prompts", "safe_prompts")
SPARE_ROUNDS = 3
"""Additional rounds, because not every answer is usable and new."""


def write_prompts(
    concepts: str,
    out: str,
    *,
    url: str,
    model: str,
    per_concept: int = 20,
    per_question: int = 10,
    templates: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    temperature: float = 1.0,
    max_tokens: int = 2048,
    timeout: float = 120.0,
    attempts: int = 5,
    overwrite: bool = False,
) -> None:
    """Ask a language model for prompts that `shards generate` draws.

    For each concept an OpenAI-compatible endpoint is asked for unsafe prompts, then for the harmless counterpart of
    each. If an answer is not exactly the requested JSON, the question is asked again; then it is counted and left
    out. Repeated prompts are left out. Every answer is stored in OUT.answers.jsonl at once, so a stopped run continues
    where it was, and a later call for more prompts asks only for the rest.

    Args:
        concepts: CSV with the columns category and concept.
        out: The CSV to write: harmful_prompt, safe_prompt, category, concept.
        url: Base URL of the API, such as http://localhost:8000/v1.
        model: The model's name there.
        per_concept: Pairs of prompts wanted for each concept.
        per_question: Prompts asked for at a time.
        templates: Folder with your own unsafe_prompts.txt and safe_prompts.txt; null: those of this package.
        key_variable: Environment variable that holds the API key; without it no key is sent.
        temperature: The sampling temperature of the model.
        max_tokens: The longest answer, in tokens.
        timeout: Seconds to wait for an answer.
        attempts: How often a question is asked if the server fails or the answer cannot be used.
        overwrite: Delete the answers of an earlier run.
    """
    from pathlib import Path

    from lit_safety.core.progress import counter

    if per_concept < 1 or not 1 <= per_question <= 50:
        raise UserError("--per_concept must be at least 1, and --per_question from 1 to 50")
    wanted = _concepts(concepts)
    questions = _templates(templates)
    asked = ChatModel(
        url, model, key_variable, temperature=temperature, max_tokens=max_tokens, timeout=timeout, attempts=attempts
    )
    settings = {
        "model": model,
        "temperature": temperature,
        "per_question": per_question,
        "questions": _hashes(questions),
    }
    log = AnswerLog(Path(f"{out}.answers.jsonl"), settings, overwrite)
    if log.rounds:
        print(f"{log.path}: continuing after {len(log.rounds)} rounds of questions")
    with counter("ask", len(wanted)) as count:
        for category, concept in wanted:
            for one in _rounds(asked, questions, log.rounds, category, concept, per_concept, per_question):
                log.add(one)
                if one.problem is not None:
                    print(f"{category}, {concept}: left out an answer that cannot be used: {one.problem}")
            count()
    _write(Path(out), log.rounds, wanted, per_concept)


def _concepts(table: str) -> list[tuple[str, str]]:
    """(category, concept) of each row, each once."""
    from lit_safety.core.categories import canonical_category
    from lit_safety.core.tables import read_csv

    found: dict[tuple[str, str], None] = {}
    for number, row in enumerate(read_csv(table, ("category", "concept")), start=2):
        concept = " ".join(row["concept"].split())
        if not concept:
            raise UserError(f"{table}: row {number}: the concept is empty")
        try:
            found[canonical_category(row["category"]), concept] = None
        except UserError as error:
            raise UserError(f"{table}: row {number}: {error}") from error
    if not found:
        raise UserError(f"{table}: holds 0 concepts")
    return list(found)


def _templates(folder: str | None) -> dict[str, Template]:
    """The questions by their name."""
    from importlib.resources import files
    from pathlib import Path
    from string import Template

    home = files("lit_safety.generation") / "templates" if folder is None else Path(folder)
    found = {}
    for name in QUESTIONS:
        try:
            found[name] = Template(decode_text((home / f"{name}.txt").read_bytes(), f"{home}/{name}.txt"))
        except OSError as error:
            raise UserError(f"{home}/{name}.txt: cannot be read ({error})") from error
        known = {"category", "concept", "count", "known" if name == "unsafe_prompts" else "prompts"}
        if not found[name].is_valid() or set(found[name].get_identifiers()) != known:
            raise UserError(f"{home}/{name}.txt: must hold ${', $'.join(sorted(known))} and no other name")
    return found


def _hashes(questions: dict[str, Template]) -> dict[str, str]:
    import hashlib

    return {name: hashlib.sha256(one.template.encode()).hexdigest() for name, one in questions.items()}


def _rounds(
    model: ChatModel,
    questions: dict[str, Template],
    done: list[Round],
    category: str,
    concept: str,
    wanted: int,
    per_question: int,
) -> Iterator[Round]:
    """Ask until there are enough new pairs, or the rounds are used up. Rounds are appended to `done`."""
    from lit_safety.core.http import AnswerError

    while True:
        own = [one for one in done if (one.category, one.concept) == (category, concept)]
        known = [unsafe for unsafe, _ in new_pairs(done).get((category, concept), [])]
        if len(known) >= wanted or len(own) >= -(-wanted // per_question) + SPARE_ROUNDS:
            return
        about = {"category": category, "concept": concept, "count": str(min(per_question, wanted - len(known)))}
        try:
            pairs = _ask(model, questions, about, known, seed=len(own))
            yield Round(category, concept, pairs)
        except AnswerError as error:
            yield Round(category, concept, [], str(error))


def _ask(
    model: ChatModel, questions: dict[str, Template], about: dict[str, str], known: list[str], seed: int
) -> list[tuple[str, str]]:
    """Two questions: the unsafe prompts, then the counterpart of each."""

    count = int(about["count"])
    first = questions["unsafe_prompts"].substitute(about, known=numbered(known[-50:]))
    unsafe = _strictly(model, first, "unsafe_prompts", 1, count, seed)
    about = {**about, "count": str(len(unsafe))}
    second = questions["safe_prompts"].substitute(about, prompts=numbered(unsafe))
    safe = _strictly(model, second, "safe_prompts", len(unsafe), len(unsafe), seed)
    return list(zip(unsafe, safe, strict=True))


def _strictly(model: ChatModel, question: str, name: str, least: int, most: int, seed: int) -> list[str]:
    from lit_safety.core.http import AnswerError

    for attempt in range(model.attempts):
        try:
            return parse_prompts(model.ask(question, seed=1000 * seed + attempt), name, least, most)
        except AnswerError as error:
            last = error
    raise AnswerError(f"after {model.attempts} attempts the answer still {last}")


def new_pairs(rounds: list[Round]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The pairs of each (category, concept), without repeated unsafe prompts and without pairs of two equal prompts.

    Prompts that differ only in case, blanks and punctuation count as equal.
    """

    seen: set[str] = set()
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one in rounds:
        for unsafe, safe in one.pairs:
            if same(unsafe) not in seen and same(unsafe) != same(safe):
                seen.add(same(unsafe))
                found.setdefault((one.category, one.concept), []).append((unsafe, safe))
    return found


def _write(out: Path, rounds: list[Round], wanted: list[tuple[str, str]], per_concept: int) -> None:
    from lit_safety.core.files import write_atomic
    from lit_safety.core.tables import csv_lines

    found = new_pairs(rounds)
    rows: list[Sequence[str]] = [("harmful_prompt", "safe_prompt", "category", "concept")]
    short = 0
    for about in wanted:
        pairs = found.get(about, [])[:per_concept]
        short += len(pairs) < per_concept
        rows += [(*pair, *about) for pair in pairs]
    write_atomic(out, csv_lines(rows).encode("utf-8"))
    asked = [one for one in rounds if (one.category, one.concept) in set(wanted)]
    written = sum(min(per_concept, len(found.get(about, []))) for about in wanted)
    repeated = sum(len(one.pairs) for one in asked) - sum(len(found.get(about, [])) for about in wanted)
    print(f"{out}: {written} pairs of prompts for {len(wanted)} concepts")
    print(f"  left out: {repeated} repeated pairs, {sum(one.problem is not None for one in asked)} answers")
    if short:
        print(f"  {short} concepts have fewer than {per_concept}")
    if not written:
        raise UserError(f"{out}: the answers gave 0 pairs of prompts; they are in {out}.answers.jsonl")
