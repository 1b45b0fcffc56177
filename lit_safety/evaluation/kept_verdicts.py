"""Verdicts of a judge whose answers cost money or minutes: kept in a journal beside the pictures as they come.

A run that is killed, or whose endpoint goes away, asks about no picture twice. Errors are not kept: those pictures are
asked about again.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lit_safety.bounded import load_json
from lit_safety.data.atomic import append_line
from lit_safety.evaluation.fingerprint import digest
from lit_safety.evaluation.judges import Judge, JudgeError, Verdict, verdict_settings
from lit_safety.evaluation.judging import sound

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_safety.evaluation.drawing import Drawn


class KeptVerdicts:
    """The journal of one judge with these settings in one folder of pictures; a verdict belongs to a picture's bytes.

    Args:
        folder: where the pictures are.
        judge: whose verdicts; other settings (threshold, template, model) have another journal.
    """

    def __init__(self, folder: Path, judge: Judge) -> None:
        self.file = folder / f"verdicts-{digest(verdict_settings(judge.settings))[:12]}.jsonl"
        self._verdicts: dict[str, Verdict] = {}
        self._keys: dict[Path, str | None] = {}
        self._torn = False
        if self.file.is_file():
            text = self.file.read_text(encoding="utf-8", errors="replace")
            self._torn = not text.endswith("\n")
            for line in text.splitlines():
                self._read(line)

    def of(self, drawn: Drawn) -> Verdict | None:
        """The verdict on a picture; None: it is to be judged."""
        key = self._key(drawn)
        return None if key is None else self._verdicts.get(key)

    def add(self, judged: Sequence[tuple[Drawn, Verdict | JudgeError]]) -> None:
        """Note new verdicts.

        Raises:
            UserError: the disk is full; what was noted before stays.
        """
        lines = []
        for drawn, verdict in judged:
            key = self._key(drawn)
            if key is not None and isinstance(verdict, Verdict):
                about = {"scores": verdict.scores, "categories": verdict.categories, "confidence": verdict.confidence}
                about |= {"harmful": verdict.harmful, "present": sorted(verdict.present)}
                lines.append(json.dumps({"sha256": key, "file": drawn.path.name, **about}))
        if lines:
            append_line(self.file, "\n".join(["", *lines] if self._torn else lines))
            self._torn = False

    def _read(self, line: str) -> None:
        try:
            said: dict[str, Any] = load_json(line)
            numbers = (said["scores"], said["categories"], said["confidence"])
            verdict = sound(Verdict(said["harmful"], *numbers, frozenset(said["present"])))
            if isinstance(verdict, Verdict):
                self._verdicts[said["sha256"]] = verdict
        except (ValueError, KeyError, TypeError):  # a line that a kill or a full disk cut short
            return

    def _key(self, drawn: Drawn) -> str | None:
        if drawn.path not in self._keys:
            there = drawn.error is None and drawn.path.is_file()
            self._keys[drawn.path] = hashlib.sha256(drawn.path.read_bytes()).hexdigest() if there else None
        return self._keys[drawn.path]
