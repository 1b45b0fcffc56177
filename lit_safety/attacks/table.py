"""What the command prints: per attack and arm, the rate without attack, the highest, and from when on half."""

from __future__ import annotations

from typing import Any

from lit_safety.evaluation.table import align, percent


def attack_table(report: dict[str, Any]) -> str:
    """The table of an attacks.json.

    Args:
        report: the content of attacks.json.
    """
    rows = [["ASR in percent", "arm", "unattacked", "highest", "of those safe before", "at", "half at"]]
    for name, attack in report["attacks"].items():
        for arm, points in attack["arms"].items():
            judged = [p for p in points if p["asr"] is not None]
            if not judged:
                rows.append([name, arm, "-", "-", "-", "-", "-"])
                continue
            top = max(judged, key=lambda p: p["asr"])
            before = _unattacked(attack, points)
            half = attack["half"][arm]
            rows.append([name, arm, _cell(before) if before else "-", _cell(top), _cell(top["post"]),
                         f"{top['budget']:g}", "never" if half is None else f"{half:g}"])  # fmt: skip
    units = [f"{name}: {a['budget']}; {a['knows']}" for name, a in report["attacks"].items()]
    notes = [
        f"{name} does not apply to {arm}: {why}"
        for name, a in report["attacks"].items()
        for arm, why in a["not_applicable"].items()
    ]
    said: dict[tuple[str, str], list[str]] = {}  # what is said of several arms of an attack is said once
    for name, a in report["attacks"].items():
        for arm, some in a["notes"].items():
            for note in some:
                said.setdefault((name, note), []).append(arm)
    notes += [f"{name} on {', '.join(arms)}: {note}" for (name, note), arms in said.items()]
    n = report["protocol"]["attacked"]
    return "\n".join([align(rows), "", f"{n} prompts an arm; 95% intervals (Wilson) in brackets", *units, *notes])


def _unattacked(attack: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((p for p in points if p["budget"] == attack["origin"]), None)


def _cell(found: dict[str, Any]) -> str:
    if found["asr"] is None:
        return "-"
    low, high = found["interval"]
    return f"{percent(found['asr'])} [{percent(low)}, {percent(high)}]"
