"""What became of each sample of a run, a line a batch: so that a resumed run does not draw again what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_safety.bounded import load_json
from lit_safety.data.atomic import append_line, write_atomic
from lit_safety.evaluation.fingerprint import digest

FILE_NAME = "generated.jsonl"
KEPT = "kept"


class Outcomes:
    """The lines of `folder/generated.jsonl`, appended to as batches are done; the first names the run's settings.

    Args:
        folder: of the shards.
        settings: JSON-able; what another run noted with other settings is forgotten.
        fresh: forget what was noted in any case.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = folder / FILE_NAME
        self._batches: dict[int, dict[str, str]] = {}
        run = json.dumps({"run": digest(dict(settings))}).encode() + b"\n"
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() and not fresh else []
        whole = run
        for line in lines[1:] if lines[:1] == [run] else []:
            try:
                noted = load_json(line)
                self._batches[int(noted["batch"])] = dict(noted["samples"])
            except (ValueError, KeyError, TypeError):
                break  # cut short by a kill: that batch is drawn again
            whole += line
        write_atomic(self.path, whole)

    def kept(self, batch: int) -> list[str] | None:
        """The keys that a batch gave; None: it was not done."""
        done = self._batches.get(batch)
        return None if done is None else [key for key, what in done.items() if what == KEPT]

    def note(self, batch: int, samples: Mapping[str, str]) -> None:
        """A batch is done: what became of each sample, `kept` or why not."""
        self._batches[batch] = dict(samples)
        append_line(self.path, json.dumps({"batch": batch, "samples": self._batches[batch]}))

    def counts(self) -> Counter[str]:
        """Reasons for which samples were left out, and how often."""
        return Counter(what for done in self._batches.values() for what in done.values() if what != KEPT)
