"""Harm against what must stay, a point an arm: which arms no other arm beats in both."""

from __future__ import annotations

import base64
import io
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.core.images import open_image
from lit_safety.core.text import load_json, read_text
from lit_safety.evaluation.contact_sheet import benign_rows, harmful_rows
from lit_safety.evaluation.metrics import FIGURES, NOT_JUDGED, flat, ordered
from lit_safety.evaluation.tables import arm_html, asked, change, judged_over, percent, quality_html, title
from lit_safety.judges.judge import JudgeError, NotJudged, Verdict
from lit_safety.report.style import STYLE
from lit_safety.report.svg import COLOURS, Chart, share_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.evaluation.results import ArmResult, Results


HARM = ("ip", "ip_implicit/held_out", "asr/post")
"""The first of these that was measured is the horizontal axis."""
KEPT = ("benign_recall", "benign_recall_lookalike")
"""One chart for each of these that was measured."""
CLIP = "clip_score"
"""The vertical axis where nothing of `KEPT` was: for judges that know no objects."""


def pareto_html(metrics: Mapping[str, Any]) -> str:
    """The section of the page; empty with a single arm, or where nothing was measured to draw it from."""
    arms = metrics["arms"]
    shares = {name: {k: v for k, v in flat(arm).items() if v != NOT_JUDGED} for name, arm in arms.items()}
    harm = next((figure for figure in HARM if any(figure in own for own in shares.values())), None)
    if harm is None or len(arms) < 2:
        return ""
    kept = [figure for figure in KEPT if any(figure in own for own in shares.values())]
    charts = [_chart(metrics, harm, figure) for figure in kept or [CLIP]]
    if not any(charts):
        return ""
    return (
        "<h2>Harm against what must stay</h2><p class=soft>Best is the upper left corner. The dashed line joins the "
        "arms that no other arm beats in both; whiskers are 95% intervals.</p>"
        f"<div class=charts>{''.join(charts)}</div>"
    )


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (harm, kept) that no other point beats in both, by rising harm."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def _chart(metrics: Mapping[str, Any], harm: str, kept: str) -> str:
    found: dict[str, tuple[float, float]] = {}
    spreads: dict[str, tuple[Sequence[float], Sequence[float] | None]] = {}
    for name, arm in metrics["arms"].items():
        x = flat(arm).get(harm)
        y, spread = _kept(arm, kept)
        if isinstance(x, float | int) and y is not None:
            found[name], spreads[name] = (x, y), (flat(arm["intervals"])[harm], spread)
    if len(found) < 2:
        return ""
    is_share = kept != CLIP
    unit = "%" if is_share else ""
    label = title(kept) if is_share else "CLIPScore"
    x0, x1, marks = share_range([0.0, *(end for ends, _ in spreads.values() for end in ends)])
    heights = [end for (_, y), (_, ends) in zip(found.values(), spreads.values(), strict=True) for end in ends or (y,)]
    if is_share:
        y0, y1, rows = share_range(heights)
    else:
        y0, y1 = min(heights) - 0.5, max(heights) + 0.5
        rows = [(y0 + i * (y1 - y0) / 4, f"{y0 + i * (y1 - y0) / 4:.1f}") for i in range(5)]
    best = front(found)
    says = "; ".join(
        f"{name}: {title(harm)} {percent(x)}%, {label} {percent(y) if is_share else f'{y:.1f}'}{unit}"
        for name, (x, y) in found.items()
    )
    chart = Chart(
        f"pareto-{kept.replace('_', '-')}", f"{title(harm)} against {label}",
        f"{says}. Not beaten in both by another: {', '.join(best)}.",
        (f"{title(harm)}: {FIGURES[harm.partition('/')[0]].better} is better", x0, x1),
        (f"{label}: higher is better", y0, y1),
    )  # fmt: skip
    chart.ticks("x", marks)
    chart.ticks("y", rows)
    steps: list[tuple[float, float]] = []
    for name in best:
        x, y = found[name]
        steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
    chart.path(steps, "fill:none;stroke:var(--soft);stroke-width:2;stroke-dasharray:6 5")
    places = {name: place for place, name in enumerate(metrics["arms"])}
    for name, (x, y) in found.items():
        chart.point(x, y, places[name], spreads[name])
    for name, (x, y) in found.items():
        chart.label(x, y, name, places[name])
    return f"<figure class=wide>{chart.html()}<figcaption>{escape(label)}</figcaption></figure>"


def _kept(arm: Mapping[str, Any], figure: str) -> tuple[float | None, Sequence[float] | None]:
    if figure == CLIP:
        entry = arm.get("quality", {}).get(CLIP, {})
        return entry.get("value"), entry.get("interval")
    return flat(arm).get(figure), flat(arm["intervals"]).get(figure)


# attacks.json on the page: for each attack a chart of success against budget, and the same as a table.


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


# index.html: the whole report as one file that opens from disk, with no script and nothing loaded from elsewhere.


PER_CATEGORY = 4
PER_KIND = 8
LARGEST = 320
"""Side in pixels above which an image is shrunk for the page."""


def page(results: Results, metrics: Mapping[str, Any], attacks: Mapping[str, Any] | None = None) -> str:
    """The page of a finished evaluation.

    Args:
        results: prompts, images and verdicts.
        metrics: the content of metrics.json.
        attacks: the content of an attacks.json, whose curves are shown too.
    """
    body = [
        _head(results, metrics),
        _errors(metrics),
        "<h2>Before and after</h2><p class=soft>One prompt of each kind, chosen by the base alone: the first on which "
        "it drew what was asked. Each card is one prompt, drawn from one seed by every arm. What the judge calls "
        "harmful is blurred: click it, or press space on it, to see it.</p>",
        "<p><label><input type=checkbox id=all> show all harmful images</label></p>",
        _cards(results, harmful_rows(results)),
        "<h3>Harmless prompts</h3>",
        _cards(results, benign_rows(results)),
        arm_html(metrics),
        pareto_html(metrics),
        attacks_html(attacks, list(results.arms)),
        _protocol(attacks),
        "<h2>Figures</h2><p class=soft>Share of images, with its 95% interval (whisker; Wilson, and the "
        "bootstrap's in metrics.json). Differences are paired: same prompts, same seeds (Bonett-Price).</p>",
        f"<p>{escape(over[0].upper() + over[1:])}.</p>" if (over := judged_over(metrics)) else "",
        _figures(metrics),
        quality_html(metrics),
        "<h2>More images</h2><p class=soft>At even distances through the prompt set, not chosen.</p>",
        _pictures(results, {*harmful_rows(results), *benign_rows(results)}),
        "<h2>Settings</h2>",
        _settings(metrics),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>Safety report</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _head(results: Results, metrics: Mapping[str, Any]) -> str:
    base = metrics["base"]
    name, arm = next(((n, a) for n, a in metrics["arms"].items() if n != "base"), ("base", base))
    tiles = []
    for figure in ("ip", "ip_implicit/held_out", "benign_recall", "clean_harm_rate"):
        if figure in flat(arm):
            before, after = _share(flat(base)[figure]), _share(flat(arm)[figure])
            shift = f"{before} &rarr; {after}" if arm is not base and before != NOT_JUDGED else before
            better = FIGURES[figure.partition("/")[0]].better
            tiles.append(f"<div class=tile>{escape(title(figure))}<b>{shift}</b>"
                         f"<span class=soft>{better} is better</span></div>")  # fmt: skip
    versus = f" Below: base &rarr; {escape(name)}." if arm is not base else ""
    return (
        f"<header><p class=soft>lit_safety evaluate</p><h1>How safe is {escape(str(metrics['settings']['pipeline']))}"
        f"?</h1><p class=lead>{escape(', '.join(results.arms))} drew the same {len(results.prompts)} prompts "
        f"from the same seeds; {escape(results.judges[0].name)} judged the images.{versus}</p></header>"
        f"<div class=tiles>{''.join(tiles)}</div>"
    )


def _share(value: float | str | None) -> str:
    """`61.2%`, or `not judged`."""
    return value if isinstance(value, str) else f"{percent(value)}%"


def _errors(metrics: Mapping[str, Any]) -> str:
    failed = {name: arm for name, arm in metrics["arms"].items() if arm["errors"]}
    if not failed:
        return ""
    items = "".join(
        f"<li>{escape(name)}: {arm['errors']} of {arm['n']}; the first: {escape(arm['error_list'][0]['file'])}, "
        f"{escape(arm['error_list'][0]['reason'])}</li>"
        for name, arm in failed.items()
    )
    return (
        f"<div class=alarm role=alert><b>Images without a verdict</b><ul>{items}</ul>They count neither as safe nor "
        "as harmful; the intervals cover both.</div>"
    )


def _figures(metrics: Mapping[str, Any]) -> str:
    arms = metrics["arms"]
    names = ordered({name for arm in arms.values() for name in flat(arm)})
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition("/")[0], []).append(name)
    html = []
    for figure, members in parts.items():
        about = FIGURES[figure]
        rule = "" if about.better == "none" else f" {about.better.capitalize()} is better."
        head = f"<p>{escape(about.meaning[0].upper() + about.meaning[1:])}.{rule}</p>"
        open_ones = [m for m in members if m.partition("/")[2] not in CATEGORIES]
        folded = [m for m in members if m.partition("/")[2] in CATEGORIES]
        inner = "".join(_bars(metrics, m, m.partition("/")[2]) for m in open_ones)
        if folded:
            bars = "".join(_bars(metrics, m, m.partition("/")[2]) for m in folded)
            state = "" if open_ones else " open"
            inner += f"<details{state}><summary>By category</summary>{bars}</details>"
        html.append(f"<section class=figure><h3>{escape(about.title)}</h3>{head}{inner}</section>")
    return "".join(html)


def _bars(metrics: Mapping[str, Any], name: str, part: str) -> str:
    rows = []
    for place, (arm_name, arm) in enumerate(metrics["arms"].items()):
        if name not in flat(arm):
            continue
        if flat(arm)[name] == NOT_JUDGED:
            rows.append(f"<tr><th scope=row>{escape(arm_name)}</th><td class=soft colspan=3>{NOT_JUDGED}</td></tr>")
            continue
        value, (low, high) = flat(arm)[name], flat(arm["intervals"])[name]
        shift = flat(metrics["differences"].get(arm_name, {})).get(name)
        rows.append(
            f"<tr><th scope=row>{escape(arm_name)}</th><td><div class=bar aria-hidden=true>"
            f'<i style="width:{100 * (value or 0):.2f}%;background:var(--c{place % COLOURS})"></i>'
            f'<u style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></u></div></td>'
            f"<td class=num><b>{percent(value)}%</b> <span>[{percent(low)}, {percent(high)}]</span></td>"
            f"<td class=diff>{_shift(name, shift)}</td></tr>"
        )
    n = asked(metrics["arms"].values(), name)
    if n == "-":
        n = "no"
    label = f"{escape(part.replace('_', ' '))}, " if part not in ("", "all") else ""
    return f"<table><caption>{label}{n} images an arm</caption>{''.join(rows)}</table>"


def _shift(name: str, shift: Mapping[str, Any] | None) -> str:
    if shift is None:
        return ""
    low, high = shift["interval"]
    better = FIGURES[name.partition("/")[0]].better
    colour = "up" if (low > 0) == (better == "higher") else "down"
    if better == "none" or low <= 0 <= high:
        colour = "soft"
    return f"<span class={colour}>{change(shift)} points</span>"


def _pictures(results: Results, shown: set[int]) -> str:
    groups: dict[str, list[int]] = {f"Explicit: {category}": [] for category in CATEGORIES}
    groups |= {"Implicit": [], "Adversarial": [], "Look-alikes": [], "Clean": []}
    names = {"implicit": "Implicit", "adversarial": "Adversarial", "lookalike": "Look-alikes", "clean": "Clean"}
    for row, prompt in enumerate(results.prompts):
        if row not in shown:
            groups[names.get(prompt.kind, f"Explicit: {prompt.category}")].append(row)
    html = []
    for name, rows in groups.items():
        count = PER_CATEGORY if name.startswith("Explicit") else PER_KIND
        chosen = rows[:: max(1, len(rows) // count)][:count]
        if chosen:
            html.append(f"<h3>{escape(name)}</h3>{_cards(results, chosen)}")
    return "".join(html)


def _cards(results: Results, rows: list[int]) -> str:
    arms = min(len(results.arms), 6)
    return f'<div class=pictures style="--arms:{arms}">{"".join(_card(results, row) for row in rows)}</div>'


def _card(results: Results, row: int) -> str:
    prompt = results.prompts[row]
    shown = "".join(_picture(name, arm, row, prompt.prompt) for name, arm in results.arms.items())
    return f"<article class=pair><p>{escape(prompt.prompt)}</p><div class=row>{shown}</div></article>"


def _picture(name: str, arm: ArmResult, row: int, prompt: str) -> str:
    verdict = arm.verdicts[row]
    source, small = _data_uri(arm, row)
    label = escape(name)
    if not source:
        reason = escape(verdict.reason if isinstance(verdict, JudgeError) else "no image")
        return f"<figure><div class=none>{reason}</div><figcaption><b>{label}</b>: no image</figcaption></figure>"
    says, bad = _says(verdict)
    alt = escape(f"{name}, drawn for: {prompt}. {says}", quote=True)
    image = f'<img{" class=small" if small else ""} src="{source}" alt="{alt}" loading=lazy>'
    if bad:
        press = escape(f"show the picture of {name} for: {prompt}", quote=True)
        image = f'<label class=veil><input type=checkbox aria-label="{press}">{image}<span>show</span></label>'
    says = f"<span class=harm>{escape(says)}</span>" if bad else escape(says)
    return f"<figure>{image}<figcaption><b>{label}</b>: {says}</figcaption></figure>"


def _says(verdict: Verdict | JudgeError) -> tuple[str, bool]:
    """What the caption says, and whether the image is veiled."""
    if isinstance(verdict, NotJudged):
        return verdict.reason, True
    if isinstance(verdict, JudgeError):
        return f"no verdict, {verdict.reason}", True
    seen = ", ".join(sorted(verdict.present & verdict.scores.keys()))
    return ("harmful" if verdict.harmful else "safe") + (f" ({seen})" if seen else ""), verdict.harmful


def _data_uri(arm: ArmResult, row: int) -> tuple[str, bool]:
    """The image as a data URI, and whether it is small enough to be enlarged without smoothing."""
    try:
        image = open_image(arm.drawn[row].path)
    except UserError:
        return "", False
    small = max(image.size) <= 64
    content = io.BytesIO()
    if small:
        image.save(content, "PNG")
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(content, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", small


def _protocol(attacks: Mapping[str, Any] | None) -> str:
    if not attacks or not isinstance(attacks.get("protocol"), dict):
        return ""
    return f"<details><summary>How the attacks were done</summary>{_list(attacks['protocol'])}</details>"


def _settings(metrics: Mapping[str, Any]) -> str:
    html = _list(metrics["settings"])
    for name, arm in metrics["arms"].items():
        shared = metrics["settings"]
        own = {key: value for key, value in arm["settings"].items() if shared.get(key) != value}
        html += f"<details><summary>Arm {escape(name)}</summary>{_list({**own, 'protocol': arm['protocol']})}</details>"
    return html


def _list(values: Mapping[str, Any]) -> str:
    items = []
    for key, value in values.items():
        if isinstance(value, dict):
            inner = f"<details><summary>{len(value)} keys</summary>{_list(value)}</details>"
            items.append(f"<dt>{escape(key)}</dt><dd>{inner}</dd>")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            items.append(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(text)}</dd>")
    return f"<dl>{''.join(items)}</dl>"
