"""attacks.json as curves of success against budget, an arm a curve: for the page, and as attacks.png."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json, read_text
from lit_safety.evaluation.tables import percent
from lit_safety.report.charts import Axis, Chart, Point, Series, png, share_range, svg
from lit_safety.report.page import Block, ChartFigure, Charts, Heading, Table, Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


FILE = "attacks.json"
MOST_BYTES = 16 << 20


def find_attacks(given: str | None, out: Path) -> dict[str, Any] | None:
    """The content of an attacks.json, given itself or by its folder; else of the one in `out`; None if there is none.

    Raises:
        UserError: the one given is not there, or a file is not an attacks.json.
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
            raise UserError(f"--attacks {file}: is larger than {MOST_BYTES} bytes, so it is not an {FILE}")
        content = load_json(read_text(file))
    except OSError as error:
        raise UserError(f"--attacks {file}: cannot be read ({error.strerror}); give the folder of `attack`") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--attacks {file}: is not JSON ({error})") from error
    try:
        for name, attack in content["attacks"].items():
            for arm, points in attack["arms"].items():
                where = f"{name}, {arm}"
                if not all(_sound(point) for point in points):
                    raise UserError(
                        f"--attacks {file}: {where}: a point is not a budget, asr, n and interval of shares"
                    )
            if not isinstance(attack["budget"], str):
                raise UserError(f"--attacks {file}: {name}: `budget` must say in words what the budget is")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--attacks {file}: is not an {FILE} of `attack` ({type(error).__name__} {error})") from error
    return content


def attack_blocks(content: Mapping[str, Any] | None, arms: Sequence[str]) -> list[Block]:
    """The section of the page: for each attack a chart, and the same as a table; nothing without attacks.

    Args:
        content: of `read_attacks`.
        arms: the arms of the page, whose colours the curves take.
    """
    if not content or not content["attacks"]:
        return []
    figures = [
        _figure(number, name, attack, arms)
        for number, (name, attack) in enumerate(content["attacks"].items())
        if _judged(attack)
    ]
    return [
        Heading("Under attack"),
        Text(
            "Share of attacked prompts that get harm drawn, against what the attacker spends; bands are 95% intervals "
            "(Wilson). Lower is better. Budgets stand at even distances.",
            soft=True,
        ),
        Charts(figures),
    ]


def curves_png(content: Mapping[str, Any]) -> bytes:
    """The image of an attacks.json, as a PNG file: one panel an attack.

    Args:
        content: of attacks.json.
    """
    arms = list(content["protocol"]["arms"])
    charts = [attack_chart(name, attack, arms) for name, attack in content["attacks"].items()]
    return png(charts, (4.6, 3.4), min(3, len(charts)))


def attack_chart(name: str, attack: Mapping[str, Any], arms: Sequence[str]) -> Chart:
    """One attack's curves; what no judge could answer is left out.

    Args:
        name: of the attack.
        attack: its part of an attacks.json.
        arms: give an arm its colour.
    """
    curves = _judged(attack)
    positions = _positions(curves)
    ends = [0.0, *(end for points in curves.values() for point in points for end in point["interval"])]
    y0, y1, rows = share_range(ends)
    every = -(-len(positions) // 8)
    marks = [(float(position), _plain(budget)) for budget, position in positions.items() if position % every == 0]
    series = [
        Series(arm, [Point(positions[p["budget"]], p["asr"], y_range=p["interval"]) for p in points],
               arms.index(arm) if arm in arms else len(arms) + order, line=True, band=True, order=order)
        for order, (arm, points) in enumerate(curves.items())
    ]  # fmt: skip
    return Chart(
        name.replace("_", " "),
        Axis(attack["budget"], (-0.2, max(1, len(positions) - 1) + 0.2), marks),
        Axis("attack success rate", (y0, y1), rows),
        series,
    )


def _judged(attack: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The points that have a rate, by arm and in order of the budget."""
    judged = {arm: [p for p in points if p["asr"] is not None] for arm, points in attack["arms"].items()}
    positions = _positions(judged)
    return {arm: sorted(points, key=lambda p: positions[p["budget"]]) for arm, points in judged.items() if points}


def _positions(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[Any, int]:
    """Budget -> its position on the axis: rising where they are numbers."""
    budgets = list({point["budget"]: None for points in curves.values() for point in points})
    if all(isinstance(budget, int | float) for budget in budgets):
        budgets.sort()
    return {budget: position for position, budget in enumerate(budgets)}


def _figure(number: int, name: str, attack: Mapping[str, Any], arms: Sequence[str]) -> ChartFigure:
    curves, chart = _judged(attack), attack_chart(name, attack, arms)
    says = "; ".join(f"{arm}: from {percent(p[0]['asr'])}% to {percent(p[-1]['asr'])}%" for arm, p in curves.items())
    drawn = svg(chart, f"attack-{number}", f"Success of the attack {chart.title}. {says}")
    legend = [(series.name, series.colour) for series in chart.series]
    return ChartFigure(drawn, chart.title, legend, _remarks(attack), _table(attack["budget"], curves))


def _remarks(attack: Mapping[str, Any]) -> str:
    """What kind of attacker it is, and which arms could not be attacked so."""
    said = [f"Attacker: {attack['knows']}."] if isinstance(attack.get("knows"), str) else []
    refused = attack.get("not_applicable")
    said += [f"{arm}: {reason}." for arm, reason in refused.items()] if isinstance(refused, dict) else []
    notes: dict[str, list[str]] = {}  # what is said of several arms is said once
    for arm, some in attack.get("notes", {}).items() if isinstance(attack.get("notes"), dict) else ():
        for note in some:
            notes.setdefault(str(note), []).append(arm)
    said += [f"{', '.join(arms)}: {note}." for note, arms in notes.items()]
    return " ".join(said)


def _table(budget: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    # Which of several ways was the strongest differs from arm to arm, so it stands beside the figure.
    named = [p for points in curves.values() for p in points if p.get("label") and not p.get("tried")]
    names = {p["budget"]: str(p["label"]) for p in named}
    rows = []
    for one in _positions(curves):
        cells = []
        for points in curves.values():
            point = next((p for p in points if p["budget"] == one), None)
            text = "-"
            if point is not None:
                low, high = point["interval"]
                text = f"{percent(point['asr'])}% [{percent(low)}, {percent(high)}] of {point['n']}"
                text += f" ({point['label']})" if point.get("tried") and point.get("label") else ""
            cells.append(text)
        rows.append([": ".join(filter(None, [_plain(one), names.get(one)])), *cells])
    return Table([budget, *curves], rows)


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
