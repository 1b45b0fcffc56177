"""attacks.json on the page: for each attack a chart of success against budget, and the same as a table."""

from __future__ import annotations

from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.bounded import load_json
from lit_safety.errors import UserError
from lit_safety.evaluation.svg import COLOURS, Chart, share_range
from lit_safety.evaluation.table import percent
from lit_safety.text_files import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FILE = "attacks.json"
MOST_BYTES = 16 << 20
DASHES = ("", "9 4", "3 3", "12 4 3 4")
"""Arms differ in dashes too: colours alone are not seen by everybody."""


def find_attacks(given: str | None, out: Path) -> dict[str, Any] | None:
    """The content of the attacks.json given, itself or by its folder; of the one in `out` where none is; None without.

    Raises:
        UserError: the one given is not there, or a file is no attacks.json.
    """
    if given is None:
        return read_attacks(out / FILE) if (out / FILE).is_file() else None
    return read_attacks(Path(given) / FILE if Path(given).is_dir() else Path(given))


def read_attacks(file: Path) -> dict[str, Any]:
    """A checked attacks.json: {"attacks": {name: {"budget": str, "arms": {arm: [point, ...]}}}, "protocol": {...}},
    a point {"budget": number or text, "asr": share or null, "n": int, "interval": [low, high]} and perhaps a "label".

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"--attacks {file}: is larger than {MOST_BYTES} bytes, so it is no {FILE}")
        content = load_json(read_text(file))
    except OSError as error:
        raise UserError(f"--attacks {file}: cannot be read ({error.strerror}); give the folder of `attack`") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--attacks {file}: is no JSON ({error})") from error
    try:
        for name, attack in content["attacks"].items():
            for arm, points in attack["arms"].items():
                where = f"{name}, {arm}"
                if not all(_sound(point) for point in points):
                    raise UserError(f"--attacks {file}: {where}: a point is no budget, asr, n and interval of shares")
            if not isinstance(attack["budget"], str):
                raise UserError(f"--attacks {file}: {name}: `budget` must say in words what the budget is")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--attacks {file}: is no {FILE} as `attack` writes it ({type(error).__name__} {error})"
        ) from error
    return content


def attacks_html(content: Mapping[str, Any] | None, arms: Sequence[str]) -> str:
    """The section of the page; empty without attacks.

    Args:
        content: of `read_attacks`.
        arms: the arms of the page, whose colours the curves take.
    """
    if not content or not content["attacks"]:
        return ""
    charts = [_attack(number, name, attack, arms) for number, (name, attack) in enumerate(content["attacks"].items())]
    return (
        "<h2>Under attack</h2><p class=soft>Share of attacked prompts that get harm drawn, against what the attacker "
        "spends; bands are 95% intervals (Wilson). Lower is better. Budgets stand at even distances.</p>"
        f"<div class=charts>{''.join(charts)}</div>"
    )


def _attack(number: int, name: str, attack: Mapping[str, Any], arms: Sequence[str]) -> str:
    judged = {arm: [p for p in points if p["asr"] is not None] for arm, points in attack["arms"].items()}
    curves = {arm: points for arm, points in judged.items() if points}
    if not curves:
        return ""
    budgets = list({point["budget"]: None for points in curves.values() for point in points})
    if all(isinstance(budget, int | float) for budget in budgets):
        budgets.sort()
    places = {budget: place for place, budget in enumerate(budgets)}
    curves = {arm: sorted(points, key=lambda p: places[p["budget"]]) for arm, points in curves.items()}
    names = {p["budget"]: str(p["label"]) for points in curves.values() for p in points if p.get("label")}
    y0, y1, rows = share_range([0.0, *(end for points in curves.values() for p in points for end in p["interval"])])
    says = "; ".join(f"{arm}: from {percent(p[0]['asr'])}% to {percent(p[-1]['asr'])}%" for arm, p in curves.items())
    chart = Chart(
        f"attack-{number}", f"Success of the attack {name.replace('_', ' ')}", says,
        (attack["budget"], -0.2, max(1, len(budgets) - 1) + 0.2), ("attack success rate", y0, y1),
    )  # fmt: skip
    every = -(-len(budgets) // 8)
    chart.ticks("x", [(place, _plain(budget)) for budget, place in places.items() if place % every == 0])
    chart.ticks("y", rows)
    legend = []
    for order, (arm, points) in enumerate(curves.items()):
        colour = (arms.index(arm) if arm in arms else len(arms) + order) % COLOURS
        dash = DASHES[order % len(DASHES)]
        line = [(places[p["budget"]], p["asr"]) for p in points]
        low = [(places[p["budget"]], p["interval"][0]) for p in points]
        high = [(places[p["budget"]], p["interval"][1]) for p in reversed(points)]
        chart.path([*low, *high], f"fill:var(--c{colour});opacity:.13;stroke:none", closed=True)
        chart.path(line, f"fill:none;stroke:var(--c{colour});stroke-width:2.5;stroke-dasharray:{dash or 'none'}")
        for x, y in line:
            chart.point(x, y, colour)
        legend.append(f'<li><i style="background:var(--c{colour})"></i>{escape(arm)}</li>')
    shown = escape(name.replace("_", " "))
    return (
        f"<figure class=wide><figcaption><b>{shown}</b></figcaption>{chart.html()}"
        f"<ul class=legend>{''.join(legend)}</ul>"
        f"{_remarks(attack)}<details><summary>{shown} as a table</summary>"
        f"{_table(attack['budget'], budgets, curves, names)}</details></figure>"
    )


def _remarks(attack: Mapping[str, Any]) -> str:
    """What kind of attacker it is, and which arms could not be attacked so."""
    said = [f"Attacker: {attack['knows']}."] if isinstance(attack.get("knows"), str) else []
    refused = attack.get("not_applicable")
    said += [f"{arm}: {reason}." for arm, reason in refused.items()] if isinstance(refused, dict) else []
    return f"<p class=soft>{escape(' '.join(said))}</p>" if said else ""


def _table(
    budget: str, budgets: Sequence[Any], curves: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[Any, str]
) -> str:
    head = "".join(f"<th scope=col>{escape(arm)}</th>" for arm in curves)
    rows = []
    for one in budgets:
        cells = []
        for points in curves.values():
            point = next((p for p in points if p["budget"] == one), None)
            text = "-"
            if point is not None:
                low, high = point["interval"]
                text = f"{percent(point['asr'])}% [{percent(low)}, {percent(high)}] of {point['n']}"
            cells.append(f"<td>{text}</td>")
        spent = ": ".join(filter(None, [_plain(one), names.get(one)]))
        rows.append(f"<tr><th scope=row>{escape(spent)}</th>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><tr><th scope=col>{escape(budget)}</th>{head}</tr>{''.join(rows)}</table></div>"


def _sound(point: Any) -> bool:
    shares = [0.0 if point["asr"] is None else point["asr"], *point["interval"]]
    whole = (
        isinstance(point["n"], int)
        and isinstance(point["budget"], int | float | str)
        and point["budget"] == point["budget"]
    )
    numbers = all(isinstance(share, int | float) and isfinite(share) and 0 <= share <= 1 for share in shares)
    return whole and numbers and len(shares) == 3


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
