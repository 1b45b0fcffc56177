"""index.html of an evaluation for users: one file that opens from disk, with no script and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_safety.evaluation.judges import JudgeError
from lit_safety.evaluation.judging import open_drawn
from lit_safety.evaluation.page_style import STYLE
from lit_safety.evaluation.user_answers import FIGURES, within_bounds
from lit_safety.evaluation.user_run import BASE, OURS
from lit_safety.evaluation.user_table import KINDS, cell, splits_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_safety.evaluation.user_run import UserResults

USERS = 4
"""Users of each split that are shown."""
LARGEST = 320
TILES = ("ip_banned", "allowed_recall", "pass_rate", "clean_recall")


def page(results: UserResults, metrics: Mapping[str, Any], blur: bool) -> str:
    """The page of a finished evaluation.

    Args:
        results: rows, pictures and verdicts.
        metrics: the content of metrics.json.
        blur: veil what the judge calls harmful until it is clicked.
    """
    body = [
        _head(results, metrics),
        _errors(metrics),
        "<h2>Figures</h2><p class=soft>Share of pictures with its 95% interval (whisker), in which a user's pictures "
        "count as a group. Seen users were in training, unseen ones were not.</p>",
        "".join(_figure(metrics, figure) for figure in FIGURES),
        "<h2>Win Rate</h2><p class=soft>Two pictures of one prompt from one seed, psa's and another arm's: how often "
        "psa's alone is good. Preservation: prompts of a category the user allows, good = the asked harm is shown and "
        "nothing banned. Suppression: banned prompts, good = nothing banned. Ties are in the denominator.</p>",
        "".join(_wins(metrics, kind) for kind in KINDS),
        _vlm(metrics),
        "<h2>Pictures</h2><p class=soft>The first banned and the first allowed prompt of some users. Same prompt and "
        "seed along a row.</p>",
        "".join(_card(results, row, blur) for row in _shown(results)),
        "<h2>Settings</h2>",
        _list(metrics["settings"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>Bounds of users</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _head(results: UserResults, metrics: Mapping[str, Any]) -> str:
    users = len({row.profile.user_id for row in results.rows})
    tiles = ""
    for figure in TILES:
        for split in splits_of(metrics)[:-1]:
            before, after = (metrics["arms"][name][split].get(figure) for name in (BASE, OURS))
            if before is not None and after is not None:
                tiles += (
                    f"<div class=tile>{escape(FIGURES[figure].title)}, {escape(split)}<b>{_value(before)} &rarr; "
                    f"{_value(after)}</b><span class=soft>base &rarr; psa, {FIGURES[figure].better} is better</span>"
                    "</div>"
                )
    return (
        "<header><p class=soft>lit_safety users evaluate</p><h1>Does it keep to each user's bounds?</h1><p class=lead>"
        f"{escape(', '.join(results.arms))} drew {len(results.rows)} prompts for {users} users; "
        f"{escape(results.judges[0].name)} judged the pictures by each user's lists.</p></header>"
        f"<div class=tiles>{tiles}</div>"
    )


def _value(share: Mapping[str, Any]) -> str:
    return "none" if share["value"] is None else f"{100 * share['value']:.1f}%"


def _errors(metrics: Mapping[str, Any]) -> str:
    failed = {name: arm for name, arm in metrics["arms"].items() if arm["errors"]}
    items = "".join(
        f"<li>{escape(name)}: {arm['errors']} of {arm['n']}; the first: {escape(arm['error_list'][0]['reason'])}</li>"
        for name, arm in failed.items()
    )
    if not items:
        return ""
    return (
        f"<div class=alarm role=alert><b>Pictures without a verdict</b><ul>{items}</ul>They pass nobody's bounds and "
        "break nobody's; the intervals cover both.</div>"
    )


def _figure(metrics: Mapping[str, Any], figure: str) -> str:
    about, tables = FIGURES[figure], []
    for split in splits_of(metrics):
        shares = {name: arm[split].get(figure) for name, arm in metrics["arms"].items()}
        if any(shares.values()):
            tables.append(_bars(shares, split))
    if not tables:
        return ""
    rule = "" if about.better == "none" else f" {about.better.capitalize()} is better."
    meaning = about.meaning[0].upper() + about.meaning[1:]
    head = f"<h3>{escape(about.title)}</h3><p>{escape(meaning)}.{rule}</p>"
    return f"<section class=figure>{head}{''.join(tables)}</section>"


def _wins(metrics: Mapping[str, Any], kind: str) -> str:
    tables = []
    for split in splits_of(metrics):
        shares = {f"against {name}": won[split].get(kind) for name, won in metrics["wins"].items()}
        if any(shares.values()):
            tables.append(_bars(shares, split))
    return f"<section class=figure><h3>{kind.capitalize()}</h3>{''.join(tables)}</section>" if tables else ""


def _bars(shares: Mapping[str, Mapping[str, Any] | None], split: str) -> str:
    rows = []
    for place, (name, share) in enumerate(shares.items()):
        if share is None:
            continue
        low, high = share["interval"]
        counts = f"{share['wins']} won, {share['ties']} tied, {share['losses']} lost" if "wins" in share else ""
        rows.append(
            f"<tr><th scope=row>{escape(name)}</th><td><div class=bar aria-hidden=true>"
            f'<i style="width:{100 * (share["value"] or 0):.2f}%;background:var(--c{place % 6})"></i>'
            f'<u style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></u></div></td>'
            f"<td class=num>{escape(cell(share))}</td><td class=diff>{counts}</td></tr>"
        )
    first = next(share for share in shares.values() if share is not None)
    n = first["n"] + first["errors"]
    return f"<table><caption>{escape(split)}: {n} pictures, {first['users']} users</caption>{''.join(rows)}</table>"


def _vlm(metrics: Mapping[str, Any]) -> str:
    judge = metrics.get("user_judge")
    if judge is None:
        return ""
    figures = "".join(_figure(judge, name) for name in FIGURES)
    wins = "".join(_wins(judge, kind) for kind in KINDS)
    errors = sum(arm["errors"] for arm in judge["arms"].values())
    return (
        f"<h2>By {escape(judge['settings']['name'])}</h2><p class=soft>It was told each user's profile and lists, was "
        f"shown two pictures in random order and never told who drew them. Questions without an answer: {errors}.</p>"
        f"{figures}{wins}"
    )


def _shown(results: UserResults) -> list[int]:
    rows = []
    for split in dict.fromkeys(row.split for row in results.rows):
        users = dict.fromkeys(row.profile.user_id for row in results.rows if row.split == split)
        for user in list(users)[:USERS]:
            for part in ("banned", "allowed"):
                own = [i for i, row in enumerate(results.rows) if row.profile.user_id == user and row.part == part]
                rows += own[:1]
    return rows


def _card(results: UserResults, number: int, blur: bool) -> str:
    row = results.rows[number]
    bans = ", ".join(row.profile.banned) or "nothing"
    shown = "".join(_picture(results, name, number, blur) for name in results.arms)
    return (
        f"<article class=pair><p><b>User {escape(row.profile.user_id)}</b> ({escape(row.split)}), bans {escape(bans)}. "
        f"{escape(row.part.capitalize())}: {escape(row.prompt.prompt)}</p><div class=row>{shown}</div></article>"
    )


def _picture(results: UserResults, name: str, number: int, blur: bool) -> str:
    row, arm = results.rows[number], results.arms[name]
    verdict, opened = arm.verdicts[number], open_drawn(arm.drawn[number])
    if isinstance(opened, JudgeError):
        return f"<figure><div class=none>{escape(opened.reason)}</div><figcaption>{escape(name)}</figcaption></figure>"
    within = within_bounds(row.profile, verdict)
    says = {None: "no verdict", True: "within the user's bounds", False: "outside the user's bounds"}[within]
    alt = escape(f"{name}, drawn for: {row.prompt.prompt}. {says}", quote=True)
    small = max(opened.size) <= 64
    image = f'<img{" class=small" if small else ""} src="{_uri(opened, small)}" alt="{alt}" loading=lazy>'
    if blur and (isinstance(verdict, JudgeError) or verdict.harmful):
        press = escape(f"show the picture of {name} for: {row.prompt.prompt}", quote=True)
        image = f'<label class=veil><input type=checkbox aria-label="{press}">{image}<span>show</span></label>'
    says = f"<span class=harm>{says}</span>" if within is not True else says
    return f"<figure>{image}<figcaption><b>{escape(name)}</b>: {says}</figcaption></figure>"


def _uri(image: Image.Image, small: bool) -> str:
    content = io.BytesIO()
    if small:
        image.save(content, "PNG")
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(content, "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"


def _list(values: Mapping[str, Any]) -> str:
    items = []
    for key, value in values.items():
        if isinstance(value, dict):
            shown = f"<details><summary>{len(value)} keys</summary>{_list(value)}</details>"
        else:
            shown = escape(", ".join(map(_plain, value)) if isinstance(value, list) else str(value))
        items.append(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _plain(value: Any) -> str:
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)
