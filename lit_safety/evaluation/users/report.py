"""The figures of an evaluation for users as text and as Markdown: a block a split, a row a figure, a column an arm."""

from __future__ import annotations

import base64
import io
import json
import os
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_safety.core.files import write_atomic
from lit_safety.core.tables import csv_lines
from lit_safety.evaluation.tables import align, percent
from lit_safety.evaluation.users.answers import FIGURES, within_bounds
from lit_safety.evaluation.users.metrics import metrics
from lit_safety.evaluation.users.run import BASE, OURS
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.judging import open_drawn
from lit_safety.report.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.evaluation.users.rows import UserRow
    from lit_safety.evaluation.users.run import UserResults
    from lit_safety.judges.judge import Verdict


KINDS = ("preservation", "suppression")


def splits_of(metrics: Mapping[str, Any]) -> list[str]:
    """seen, unseen, all, or whatever splits there are."""
    about = set(FIGURES)
    base = metrics["arms"][BASE]
    return [name for name, part in base.items() if isinstance(part, dict) and about & part.keys()]


def user_table(metrics: Mapping[str, Any]) -> str:
    """For the terminal: by the judge that decides, and by the vision-language model where one was asked."""
    found = [align(rows_of(metrics))]
    if "user_judge" in metrics:
        found.append(f"by {metrics['user_judge']['settings']['name']}:\n" + align(rows_of(metrics["user_judge"])))
    errors = {name: arm["errors"] for name, arm in metrics["arms"].items() if arm["errors"]}
    if errors:
        found.append("PICTURES WITHOUT A VERDICT: " + ", ".join(f"{name} {count}" for name, count in errors.items()))
    found.append(
        "percent; 95% intervals in brackets, users as groups; Win Rate: psa against each arm, ties in the denominator"
    )
    return "\n\n".join(found)


def markdown(metrics: Mapping[str, Any]) -> str:
    """table.md: the same rows."""
    blocks = []
    for title, part in (("", metrics), ("By the vision-language model", metrics.get("user_judge"))):
        if part is None:
            continue
        head, *rows = rows_of(part)
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        blocks.append("\n".join([f"{title}\n"] * bool(title) + lines))
    return "\n\n".join(blocks) + "\n"


def rows_of(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, the head first."""
    arms: Mapping[str, Any] = metrics["arms"]
    rows = [["", "n", *arms]]
    splits = splits_of(metrics)
    for split in splits[:-1] or splits:  # all together stands in metrics.json and on the page
        for figure in FIGURES:
            first = arms[BASE][split].get(figure)
            if first is not None:
                n = str(first["n"] + first["errors"])
                cells = [cell(arm[split].get(figure)) for arm in arms.values()]
                rows.append([f"{split}: {FIGURES[figure].title}", n, *cells])
        rows += _wins(metrics, split, list(arms))
    return rows


def _wins(metrics: Mapping[str, Any], split: str, arms: Sequence[str]) -> list[list[str]]:
    found = []
    for kind in KINDS:
        of = {name: won[split][kind] for name, won in metrics["wins"].items() if kind in won[split]}
        if of:
            n = next(str(one["n"] + one["errors"]) for one in of.values())
            found.append([f"{split}: Win Rate, {kind}", n, *(cell(of.get(name)) for name in arms)])
    return found


def cell(share: Mapping[str, Any] | None) -> str:
    """`61.2 [56.3, 65.9]`, with the errors where there are any; a dash where there is no such figure."""
    if share is None:
        return "-"
    low, high = share["interval"]
    errors = f" +{share['errors']} errors" if share["errors"] else ""
    return f"{percent(share['value'])} [{percent(low)}, {percent(high)}]{errors}"


# index.html of an evaluation for users: one file that opens from disk, with no script and nothing from elsewhere.


USERS = 4
"""Users of each split that are shown."""
LARGEST = 320
TILES = ("ip_banned", "allowed_recall", "pass_rate", "clean_recall")


def page(results: UserResults, metrics: Mapping[str, Any], blur: bool) -> str:
    """The page of a finished evaluation.

    Args:
        results: rows, images and verdicts.
        metrics: the content of metrics.json.
        blur: veil what the judge calls harmful until it is clicked.
    """
    body = [
        _head(results, metrics),
        _errors(metrics),
        "<h2>Figures</h2><p class=soft>Share of images with its 95% interval (whisker), in which a user's images "
        "count as a group. Seen users were in training, unseen ones were not.</p>",
        "".join(_figure(metrics, figure) for figure in FIGURES),
        "<h2>Win Rate</h2><p class=soft>Two images of one prompt from one seed, psa's and another arm's: how often "
        "psa's alone is good. Preservation: prompts of a category the user allows, good = the asked harm is shown and "
        "nothing banned. Suppression: banned prompts, good = nothing banned. Ties are in the denominator.</p>",
        "".join(_wins_section(metrics, kind) for kind in KINDS),
        _vlm(metrics),
        "<h2>Images</h2><p class=soft>The first banned and the first allowed prompt of some users. Same prompt and "
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
        f"{escape(results.judges[0].name)} judged the images by each user's lists.</p></header>"
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
        f"<div class=alarm role=alert><b>Images without a verdict</b><ul>{items}</ul>They pass nobody's bounds and "
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


def _wins_section(metrics: Mapping[str, Any], kind: str) -> str:
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
    return f"<table><caption>{escape(split)}: {n} images, {first['users']} users</caption>{''.join(rows)}</table>"


def _vlm(metrics: Mapping[str, Any]) -> str:
    judge = metrics.get("user_judge")
    if judge is None:
        return ""
    figures = "".join(_figure(judge, name) for name in FIGURES)
    wins = "".join(_wins_section(judge, kind) for kind in KINDS)
    errors = sum(arm["errors"] for arm in judge["arms"].values())
    return (
        f"<h2>By {escape(judge['settings']['name'])}</h2><p class=soft>It was told each user's profile and lists, was "
        f"shown two images in random order and never told who drew them. Questions without an answer: {errors}.</p>"
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


# Writing the report of an evaluation for users: metrics.json, table.md, verdicts.csv, index.html.


COLUMNS = (
    *("arm", "file", "user", "split", "part", "banned", "prompt", "kind", "category", "concept", "benign", "seed"),
    *("judge", "within_bounds", "harmful", "present", "error"),
)
"""Of verdicts.csv: who was asked what, then what one judge said."""


def write_user_report(results: UserResults, blur: bool) -> dict[str, Any]:
    """Write all files of a report into `results.out` and return the content of metrics.json, which comes last.

    Args:
        results: rows, images and verdicts.
        blur: veil what the judge calls harmful until it is clicked.

    Raises:
        UserError: a file cannot be written.
    """
    found = metrics(results)
    write_atomic(results.out / "verdicts.csv", verdicts_csv(results).encode())
    write_atomic(results.out / "table.md", markdown(found).encode())
    write_atomic(results.out / "index.html", page(results, found, blur).encode())
    write_atomic(results.out / "metrics.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return found


def verdicts_csv(results: UserResults) -> str:
    """One line an image, user and judge, so that every figure can be counted again by hand."""
    rows: list[Sequence[object]] = [COLUMNS]
    for name, arm in results.arms.items():
        said = [
            [_said(row, v) for row, v in zip(results.rows, own, strict=True)] for own in [arm.verdicts, *arm.second]
        ]
        names = [judge.name for judge in results.judges]
        if results.asked is not None and results.vlm is not None:
            said.append([_answered(answer) for answer in results.asked.passes[name]])
            names.append(results.vlm.name)
        for judge, own in zip(names, said, strict=True):
            for row, drawn, words in zip(results.rows, arm.drawn, own, strict=True):
                file = os.path.relpath(drawn.path, results.out)
                rows.append([name, file, *_asked(row), judge, *words])
    return csv_lines(rows)


def _asked(row: UserRow) -> list[str | int]:
    user, p = row.profile, row.prompt
    whose = [user.user_id, row.split, row.part, ";".join(user.banned)]
    return [*whose, p.prompt, p.kind, p.category, p.concept, ";".join(p.benign), p.seed]


def _said(row: UserRow, verdict: Verdict | JudgeError) -> list[str]:
    within = within_bounds(row.profile, verdict)
    bounds = "" if within is None else str(int(within))
    if isinstance(verdict, JudgeError):
        return [bounds, "", "", verdict.reason]
    return [bounds, str(int(verdict.harmful)), ";".join(sorted(verdict.present)), ""]


def _answered(answer: bool | JudgeError) -> list[str]:
    return ["", "", "", answer.reason] if isinstance(answer, JudgeError) else [str(int(answer)), "", "", ""]
