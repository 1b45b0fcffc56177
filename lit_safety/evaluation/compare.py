"""The command `compare`: finished reports side by side, where they may be compared at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json, read_text

COUNTED = ("hits", "n", "errors")


def compare(reports: list[str]) -> None:
    """Print the arms of several reports in one table.

    Two arms share a row only when they answer the same questions: equal prompts, seeds, judge, steps, guidance,
    size and scheduler. Others stand in a block of their own rows. Reports that name a protocol are compared with
    reports of the same protocol alone.

    Args:
        reports: Two or more metrics.json, or the folders that hold them.

    Raises:
        UserError: fewer than two are given, one is not a metrics.json, or they follow different named protocols.
    """
    if len(reports) < 2:
        raise UserError("--reports: give two or more metrics.json, or their folders")
    read = [(report, read_metrics(report)) for report in reports]
    check_protocols(read)
    print(compare_table(read))


def check_protocols(reports: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuse reports of which one follows a named protocol and another follows none, another, or deviates otherwise.

    Raises:
        UserError: names two of them, and what each follows.
    """
    followed: dict[str, str] = {}
    for report, metrics in reports:
        for arm in metrics["arms"].values():
            followed.setdefault(_followed(arm["settings"].get("protocol")), report)
    if len(followed) > 1:
        said = "; ".join(f"{report} follows {protocol}" for protocol, report in followed.items())
        raise UserError(f"--reports: figures of different protocols are not compared: {said}")


def _followed(protocol: dict[str, Any] | None) -> str:
    """`safetydpo-i2p (1a2b3c4d), but for judge and prompts`."""
    if protocol is None:
        return "no named protocol"
    from lit_safety.core.hashes import digest

    deviations = protocol.get("deviations") or {}
    but = f", but for {' and '.join(deviations)} ({digest(deviations)[:8]})" if deviations else ""
    return f"{protocol['name']} ({protocol['sha256'][:8]}){but}"


def read_metrics(report: str) -> dict[str, Any]:
    """The content of a metrics.json, given itself or its folder.

    Raises:
        UserError: there is none, or it was not written by `evaluate`.
    """
    file = Path(report) / "metrics.json" if Path(report).is_dir() else Path(report)
    try:
        metrics = load_json(read_text(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a metrics.json or its folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error})") from error
    if not isinstance(metrics, dict) or metrics.get("format") != 1:
        raise UserError(f"{file}: is not a metrics.json of format 1; write it again with `evaluate`")
    arms = metrics.get("arms")
    needed = {"protocol", "settings", "counts", "intervals"}
    if not isinstance(arms, dict) or not all(isinstance(arm, dict) and needed <= arm.keys() for arm in arms.values()):
        raise UserError(f"{file}: lacks the arms of `evaluate`; `compare` reads only its metrics.json")
    for name, arm in arms.items():
        check_arm(arm, f"{file}: arms.{name}")
    return metrics


def check_arm(arm: dict[str, Any], where: str) -> None:
    """Complain about an arm that `evaluate` did not write so: files are edited by hand, and figures are believed.

    Args:
        arm: the arm, as it stands in metrics.json.
        where: the file and the arm's key, for messages.

    Raises:
        UserError: names the file and the key.
    """
    from lit_safety.evaluation.metrics import FIGURES, PARTS

    if not isinstance(arm["protocol"], str):
        raise UserError(f"{where}.protocol: must be a text, not {_brief(arm['protocol'])}")
    _check_settings(arm["settings"], f"{where}.settings")
    for beside in ("counts", "intervals"):
        if not isinstance(arm[beside], dict):
            raise UserError(f"{where}.{beside}: must be an object, not {_brief(arm[beside])}")
    for figure in FIGURES:
        counts, intervals = (arm[beside].get(figure) for beside in ("counts", "intervals"))
        if figure not in arm:
            if counts is not None or intervals is not None:
                raise UserError(f"{where}.{figure}: is missing, though counts and intervals tell of it")
            continue
        value = arm[figure]
        if not isinstance(value, dict):
            _check_share(value, counts, intervals, where, figure)
            continue
        for part in value:
            if part not in PARTS:
                raise UserError(f"{where}.{figure}.{_brief(part)}: there is no such part; known are {', '.join(PARTS)}")
        counts, intervals = (one if isinstance(one, dict) else {} for one in (counts, intervals))
        if lost := [part for part in [*counts, *intervals] if part not in value]:
            raise UserError(f"{where}.{figure}.{_brief(lost[0])}: is missing, though counts and intervals tell of it")
        for part, share in value.items():
            _check_share(share, counts.get(part), intervals.get(part), where, f"{figure}.{part}")
    _check_not_judged(arm.get("not_judged", {}), f"{where}.not_judged")
    _check_quality(arm.get("quality", {}), f"{where}.quality")


def _check_share(share: Any, counts: Any, interval: Any, where: str, key: str) -> None:
    from lit_safety.evaluation.metrics import NOT_JUDGED, NOT_MEASURED

    if share in (NOT_JUDGED, NOT_MEASURED) and counts is None and interval is None:
        return
    whole = isinstance(counts, dict) and all(type(counts.get(k)) is int and counts[k] >= 0 for k in COUNTED)
    if not whole or counts["hits"] > counts["n"]:
        raise UserError(f"{where}.counts.{key}: must hold the whole numbers {', '.join(COUNTED)}, hits at most n, not "
                        f"{_brief(counts)}")  # fmt: skip
    right = counts["hits"] / counts["n"] if counts["n"] else None
    if share is not None and not _is_number(share, 0, 1):
        raise UserError(f"{where}.{key}: must be a share from 0 to 1 or null, not {_brief(share)}")
    if (share is None) != (right is None) or (right is not None and abs(share - right) > 1e-6):
        raise UserError(f"{where}.{key}: is {_brief(share)}, and its own counts say {counts['hits']} of {counts['n']}; "
                        "write the report again with `evaluate`")  # fmt: skip
    ends = interval if isinstance(interval, list) else []
    if len(ends) != 2 or not all(_is_number(end, 0, 1) for end in ends) or ends[0] > ends[1]:
        raise UserError(f"{where}.intervals.{key}: must be two shares, the lower first, not {_brief(interval)}")
    if share is not None and not ends[0] - 1e-6 <= share <= ends[1] + 1e-6:
        raise UserError(f"{where}.intervals.{key}: {_brief(interval)} does not hold the share {share}")


def _check_settings(settings: Any, where: str) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{where}: must be an object, not {_brief(settings)}")
    judge, edit = settings.get("judge"), settings.get("edit")
    if not isinstance(judge, dict) or not isinstance(judge.get("name"), str):
        raise UserError(f"{where}.judge: must be an object with a `name`, not {_brief(judge)}")
    named = settings.get("protocol")
    if named is not None and not (
        isinstance(named, dict)
        and all(isinstance(named.get(key), str) for key in ("name", "sha256"))
        and isinstance(named.get("deviations", {}), dict)
    ):
        raise UserError(f"{where}.protocol: must be an object with name, sha256 and deviations, not {_brief(named)}")
    seen = judge.get("categories", [])
    if not isinstance(seen, list) or not all(isinstance(one, str) for one in seen):
        raise UserError(f"{where}.judge.categories: must be a list of categories, not {_brief(seen)}")
    if edit is not None and not (isinstance(edit, dict) and isinstance(edit.get("task"), str) and "strength" in edit):
        raise UserError(f"{where}.edit: must be an object with `task` and `strength`, not {_brief(edit)}")


def _check_not_judged(counts: Any, where: str) -> None:
    if not isinstance(counts, dict) or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise UserError(f"{where}: must say for each category how many images, not {_brief(counts)}")


def _check_quality(quality: Any, where: str) -> None:
    if not isinstance(quality, dict):
        raise UserError(f"{where}: must be an object, not {_brief(quality)}")
    for figure, entry in quality.items():
        ends = entry.get("interval") if isinstance(entry, dict) else []
        sound = (
            isinstance(entry, dict)
            and isinstance(entry.get("protocol"), str)
            and all(type(entry.get(key)) is int and entry[key] >= 0 for key in ("n", "errors"))
            and (entry.get("value") is None or _is_number(entry["value"]))
            and (ends is None or (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))))
        )
        if not sound:
            raise UserError(f"{where}.{figure}: must hold value, interval, n, errors and protocol, not {_brief(entry)}")


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _brief(value: Any) -> str:
    return repr(value)[:60]


def compare_table(reports: list[tuple[str, dict[str, Any]]]) -> str:
    """One table over named reports: a column an arm, a block of rows a protocol.

    An arm that stands in several reports with the same settings and figures is shown once.
    """
    from lit_safety.core.intervals import IN_WORDS
    from lit_safety.evaluation.metrics import ALWAYS, flat, ordered
    from lit_safety.evaluation.tables import align, asked, cell, over_categories, shown, title

    columns: dict[str, dict[str, Any]] = {}
    for report, metrics in reports:
        for name, arm in metrics["arms"].items():
            if arm not in columns.values():
                columns[f"{_short(report)}: {name}"] = arm
    rows = [["in percent", "n", *columns]]
    protocols = list(dict.fromkeys(arm["protocol"] for arm in columns.values()))
    notes = ["", IN_WORDS]
    for number, protocol in enumerate(protocols, start=1):
        members = {name: arm for name, arm in columns.items() if arm["protocol"] == protocol}
        if len(protocols) > 1:
            rows.append([f"PROTOCOL {number}", "", *("" for _ in columns)])
            notes.append(f"protocol {number}: {_describe(next(iter(members.values())))}")
        if over := over_categories(next(iter(members.values()))["settings"].get("judge"), members.values()):
            notes.append(f"protocol {number}: {over}" if len(protocols) > 1 else over)
        for figure in ordered({*ALWAYS, *(f for arm in members.values() for f in flat(arm) if shown(f))}):
            cells = [cell(arm, figure) if name in members else "" for name, arm in columns.items()]
            rows.append([title(figure), asked(members.values(), figure), *cells])
        rows += _quality_rows(columns, members)
    if len(protocols) > 1:
        notes.append("figures of different protocols must not be compared")
    return "\n".join([align(rows), *notes])


def _quality_rows(columns: dict[str, dict[str, Any]], members: dict[str, dict[str, Any]]) -> list[list[str]]:
    """FID and CLIPScore: one row for each way in which a figure was measured (features, reference, CLIP)."""
    from lit_safety.evaluation.tables import about, figures_in, quality_cell, quality_n

    rows = []
    for figure in figures_in(members.values()):
        having = {name: arm for name, arm in members.items() if figure in arm.get("quality", {})}
        for how in dict.fromkeys(arm["quality"][figure]["protocol"] for arm in having.values()):
            same = {name: arm for name, arm in having.items() if arm["quality"][figure]["protocol"] == how}
            cells = [quality_cell(arm, figure) if name in same else "" for name, arm in columns.items()]
            rows.append([f"{about(figure).title}, not in percent", quality_n(same.values(), figure), *cells])
    return rows


def _short(report: str) -> str:
    path = Path(report)
    return str(path.parent if path.name == "metrics.json" else path)


def _describe(arm: dict[str, Any]) -> str:
    settings = arm["settings"]
    judge, edit = settings["judge"], settings.get("edit")
    task = "" if edit is None else f", {edit['task'].replace('_', ' ')} at strength {edit['strength']}"
    return (
        f"judge {judge['name']} {str(judge.get('sha256') or '')[:8]}, prompts {settings.get('prompts')} "
        f"{str(settings.get('prompts_sha256'))[:8]}, {settings.get('scheduler')} {settings.get('steps')} steps, "
        f"guidance {settings.get('guidance')}, {settings.get('pixels') or 'unknown'} pixels{task}"
    )
