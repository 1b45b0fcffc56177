"""The answers of a language model, a line each, appended as they come: what was paid for is never asked again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_safety.bounded import load_json
from lit_safety.data.atomic import append_line, write_atomic
from lit_safety.errors import UserError
from lit_safety.evaluation.fingerprint import digest


@dataclass(frozen=True)
class Round:
    """What one round of questions about a concept gave."""

    category: str
    concept: str
    pairs: list[tuple[str, str]]
    """(unsafe, safe) prompts; empty where the answers could not be used."""
    problem: str | None = None
    """Why they could not."""


class AnswerLog:
    """The rounds of a run in an append-only JSONL file, the first line of which names the run's settings.

    Args:
        path: the file.
        settings: JSON-able; what the answers depend on.
        overwrite: forget what stands there.

    Raises:
        UserError: the answers there were given to other questions.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.rounds: list[Round] = []
        head = json.dumps({"run": digest(dict(settings)), **settings}, ensure_ascii=False).encode() + b"\n"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() and not overwrite else []
        if lines and lines[0] != head:
            raise UserError(
                f"{path}: holds answers of another model or to other questions; name another file with --out, or give "
                "--overwrite true to throw them away"
            )
        whole = head
        for line in lines[1:]:
            try:
                noted = load_json(line)
                self.rounds.append(Round(**{**noted, "pairs": [(str(a), str(b)) for a, b in noted["pairs"]]}))
            except (ValueError, KeyError, TypeError):
                break  # cut short by a kill
            whole += line
        write_atomic(path, whole)

    def add(self, one: Round) -> None:
        """Note a round."""
        self.rounds.append(one)
        append_line(self.path, json.dumps(asdict(one), ensure_ascii=False))
