"""index.html: the whole report as one file that opens from disk, with no script and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_safety.data.categories import CATEGORIES
from lit_safety.data.images import open_image
from lit_safety.errors import UserError
from lit_safety.evaluation.arm_table import arm_html
from lit_safety.evaluation.attack_curves import attacks_html
from lit_safety.evaluation.contact_sheet import benign_rows, harmful_rows
from lit_safety.evaluation.judges import JudgeError, NotJudged, Verdict
from lit_safety.evaluation.metrics import FIGURES, NOT_JUDGED, flat, ordered
from lit_safety.evaluation.page_style import STYLE
from lit_safety.evaluation.pareto import pareto_html
from lit_safety.evaluation.quality_view import quality_html
from lit_safety.evaluation.svg import COLOURS
from lit_safety.evaluation.table import asked, change, judged_over, percent, title

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_safety.evaluation.results import ArmResult, Results

PER_CATEGORY = 4
PER_KIND = 8
LARGEST = 320
"""Side in pixels above which a picture is shrunk for the page."""


def page(results: Results, metrics: Mapping[str, Any], attacks: Mapping[str, Any] | None = None) -> str:
    """The page of a finished evaluation.

    Args:
        results: prompts, pictures and verdicts.
        metrics: the content of metrics.json.
        attacks: the content of an attacks.json, whose curves are shown too.
    """
    body = [
        _head(results, metrics),
        _errors(metrics),
        "<h2>Before and after</h2><p class=soft>One prompt of each kind, chosen by the base alone: the first on which "
        "it drew what was asked. Each card is one prompt, drawn from one seed by every arm. What the judge calls "
        "harmful is blurred: click it, or press space on it, to see it.</p>",
        "<p><label><input type=checkbox id=all> show all harmful pictures</label></p>",
        _cards(results, harmful_rows(results)),
        "<h3>Harmless prompts</h3>",
        _cards(results, benign_rows(results)),
        arm_html(metrics),
        pareto_html(metrics),
        attacks_html(attacks, list(results.arms)),
        _protocol(attacks),
        "<h2>Figures</h2><p class=soft>Share of pictures, with its 95% interval (whisker; Wilson, and the "
        "bootstrap's in metrics.json). Differences are paired: same prompts, same seeds (Bonett-Price).</p>",
        f"<p>{escape(over[0].upper() + over[1:])}.</p>" if (over := judged_over(metrics)) else "",
        _figures(metrics),
        quality_html(metrics),
        "<h2>More pictures</h2><p class=soft>At even distances through the prompt set, not chosen.</p>",
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
        f"from the same seeds; {escape(results.judges[0].name)} judged the pictures.{versus}</p></header>"
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
        f"<div class=alarm role=alert><b>Pictures without a verdict</b><ul>{items}</ul>They count neither as safe nor "
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
    return f"<table><caption>{label}{n} pictures an arm</caption>{''.join(rows)}</table>"


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
        reason = escape(verdict.reason if isinstance(verdict, JudgeError) else "no picture")
        return f"<figure><div class=none>{reason}</div><figcaption><b>{label}</b>: no picture</figcaption></figure>"
    says, bad = _says(verdict)
    alt = escape(f"{name}, drawn for: {prompt}. {says}", quote=True)
    image = f'<img{" class=small" if small else ""} src="{source}" alt="{alt}" loading=lazy>'
    if bad:
        press = escape(f"show the picture of {name} for: {prompt}", quote=True)
        image = f'<label class=veil><input type=checkbox aria-label="{press}">{image}<span>show</span></label>'
    says = f"<span class=harm>{escape(says)}</span>" if bad else escape(says)
    return f"<figure>{image}<figcaption><b>{label}</b>: {says}</figcaption></figure>"


def _says(verdict: Verdict | JudgeError) -> tuple[str, bool]:
    """What the caption says, and whether the picture is veiled."""
    if isinstance(verdict, NotJudged):
        return verdict.reason, True
    if isinstance(verdict, JudgeError):
        return f"no verdict, {verdict.reason}", True
    seen = ", ".join(sorted(verdict.present & verdict.scores.keys()))
    return ("harmful" if verdict.harmful else "safe") + (f" ({seen})" if seen else ""), verdict.harmful


def _data_uri(arm: ArmResult, row: int) -> tuple[str, bool]:
    """The picture as a data URI, and whether it is small enough to be enlarged without smoothing."""
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
