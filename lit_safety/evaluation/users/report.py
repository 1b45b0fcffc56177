"""The figures of an evaluation for users as text and as Markdown: a block a split, a row a figure, a column an arm."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from lit_safety.core.files import write_atomic
from lit_safety.core.tables import csv_lines
from lit_safety.evaluation.metrics import NOT_MEASURED
from lit_safety.evaluation.tables import align, percent
from lit_safety.evaluation.users.answers import FIGURES, within_bounds
from lit_safety.evaluation.users.metrics import metrics
from lit_safety.evaluation.users.run import BASE, OURS
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.judging import open_drawn
from lit_safety.report import page as html
from lit_safety.report.page import (
    Alarm,
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    Figure,
    Heading,
    Settings,
    Shown,
    Text,
    Tile,
    Tiles,
    data_uri,
)

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
    if named := metrics.get("settings", {}).get("named_protocol"):
        but = f". NOT as the protocol says: {', '.join(named['deviations'])}" if named["deviations"] else ""
        found.insert(0, f"protocol {named['name']} ({named['sha256'][:8]}): {named['title']}{but}")
    if "user_judge" in metrics:
        found.append(f"by {metrics['user_judge']['settings']['name']}:\n" + align(rows_of(metrics["user_judge"])))
    errors = {name: arm["errors"] for name, arm in metrics["arms"].items() if arm["errors"]}
    if errors:
        found.append("IMAGES WITHOUT A VERDICT: " + ", ".join(f"{name} {count}" for name, count in errors.items()))
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
    if share["n"] + share["errors"] == 0:
        return NOT_MEASURED
    low, high = share["interval"]
    errors = f" +{share['errors']} errors" if share["errors"] else ""
    return f"{percent(share['value'])} [{percent(low)}, {percent(high)}]{errors}"


# index.html of an evaluation for users: one file that opens from disk, with no script and nothing from elsewhere.


USERS = 4
"""Users of each split that are shown."""
TILES = ("ip_banned", "allowed_recall", "pass_rate", "pass_unsorted", "clean_recall", "unnamed_recall")


def page(results: UserResults, metrics: Mapping[str, Any], blur: bool) -> str:
    """The page of a finished evaluation.

    Args:
        results: rows, images and verdicts.
        metrics: the content of metrics.json.
        blur: veil what the judge calls harmful until it is clicked.
    """
    users = len({row.profile.user_id for row in results.rows})
    blocks: list[Block] = [
        Tiles(_tiles(metrics)),
        *_errors(metrics),
        Heading("Figures"),
        Text(
            "Share of images with its 95% interval (whisker), in which a user's images count as a group. Seen users "
            "were in training, unseen ones were not.",
            soft=True,
        ),
        *_figures(metrics),
        Heading("Win Rate"),
        Text(
            "Two images of one prompt from one seed, psa's and another arm's: how often psa's alone is good. "
            "Preservation: prompts of a category the user allows, good = the asked harm is shown and nothing banned. "
            "Suppression: banned prompts, good = nothing banned. Ties are in the denominator.",
            soft=True,
        ),
        *_win_figures(metrics),
        *_vlm(metrics),
        Heading("Images"),
        Text(
            "The first prompt of each part of some users: banned, allowed, or unsorted where the file does not say. "
            "Same prompt and seed along a row.",
            soft=True,
        ),
        Cards([_card(results, row, blur) for row in _shown(results)]),
        Heading("Settings"),
        Settings(metrics["settings"]),
    ]
    return html.page(
        "Bounds of users",
        "lit_safety users evaluate",
        "Does it keep to each user's bounds?",
        f"{', '.join(results.arms)} drew {len(results.rows)} prompts for {users} users; {results.judges[0].name} "
        "judged the images by each user's lists.",
        blocks,
    )


def _tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    for figure in TILES:
        for split in splits_of(metrics)[:-1]:
            before, after = (metrics["arms"][name][split].get(figure) for name in (BASE, OURS))
            if before is not None and after is not None:
                shift = f"{_value(before)} \u2192 {_value(after)}"
                note = f"base \u2192 psa, {FIGURES[figure].better} is better"
                tiles.append(Tile(f"{FIGURES[figure].title}, {split}", shift, note))
    return tiles


def _value(share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return "none" if share["errors"] else NOT_MEASURED
    return f"{100 * share['value']:.1f}%"


def _errors(metrics: Mapping[str, Any]) -> list[Block]:
    items = [
        f"{name}: {arm['errors']} of {arm['n']}; the first: {arm['error_list'][0]['reason']}"
        for name, arm in metrics["arms"].items()
        if arm["errors"]
    ]
    note = "They pass nobody's bounds and break nobody's; the intervals cover both."
    return [Alarm("Images without a verdict", items, note)] if items else []


def _figures(metrics: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for figure, about in FIGURES.items():
        rule = "" if about.better == "none" else f" {about.better.capitalize()} is better."
        tables = []
        for split in splits_of(metrics):
            shares = {name: arm[split].get(figure) for name, arm in metrics["arms"].items()}
            if any(shares.values()):
                tables.append(_bars(shares, split))
        if tables:
            blocks.append(Figure(about.title, f"{about.meaning[0].upper()}{about.meaning[1:]}.{rule}", tables))
    return blocks


def _win_figures(metrics: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for kind in KINDS:
        tables = []
        for split in splits_of(metrics):
            shares = {f"against {name}": won[split].get(kind) for name, won in metrics["wins"].items()}
            if any(shares.values()):
                tables.append(_bars(shares, split))
        if tables:
            blocks.append(Figure(kind.capitalize(), "", tables))
    return blocks


def _bars(shares: Mapping[str, Mapping[str, Any] | None], split: str) -> Bars:
    bars = []
    for number, (name, share) in enumerate(shares.items()):
        if share is not None:
            counts = f"{share['wins']} won, {share['ties']} tied, {share['losses']} lost" if "wins" in share else ""
            bars.append(Bar(name, cell(share), share["value"], share["interval"], number, counts))
    first = next(share for share in shares.values() if share is not None)
    return Bars(f"{split}: {first['n'] + first['errors']} images, {first['users']} users", bars)


def _vlm(metrics: Mapping[str, Any]) -> list[Block]:
    judge = metrics.get("user_judge")
    if judge is None:
        return []
    errors = sum(arm["errors"] for arm in judge["arms"].values())
    text = (
        "It was told each user's profile and lists, was shown two images in random order and never told who drew them. "
        f"Questions without an answer: {errors}."
    )
    name = judge["settings"]["name"]
    return [Heading(f"By {name}"), Text(text, soft=True), *_figures(judge), *_win_figures(judge)]


def _shown(results: UserResults) -> list[int]:
    rows = []
    for split in dict.fromkeys(row.split for row in results.rows):
        users = dict.fromkeys(row.profile.user_id for row in results.rows if row.split == split)
        for user in list(users)[:USERS]:
            for part in ("banned", "allowed", "unsorted"):
                own = [i for i, row in enumerate(results.rows) if row.profile.user_id == user and row.part == part]
                rows += own[:1]
    return rows


def _card(results: UserResults, number: int, blur: bool) -> Card:
    row = results.rows[number]
    bans = ", ".join(row.profile.banned) or "nothing"
    text = f"({row.split}), bans {bans}. {row.part.capitalize()}: {row.prompt.prompt}"
    images = [_image(results, name, number, blur) for name in results.arms]
    return Card(text, images, f"User {row.profile.user_id}")


def _image(results: UserResults, name: str, number: int, blur: bool) -> Shown:
    row, arm = results.rows[number], results.arms[name]
    verdict, opened = arm.verdicts[number], open_drawn(arm.drawn[number])
    if isinstance(opened, JudgeError):
        return Shown(name, "no image", None, opened.reason)
    within = within_bounds(row.profile, verdict)
    says = {None: "no verdict", True: "within the user's bounds", False: "outside the user's bounds"}[within]
    mark = {None: "open", True: "safe", False: "harm"}[within]
    veiled = blur and (isinstance(verdict, JudgeError) or verdict.harmful)
    veil = f"show the image of {name} for: {row.prompt.prompt}" if veiled else ""
    source, small = data_uri(opened)
    alt = f"{name}, drawn for: {row.prompt.prompt}. {says}"
    return Shown(name, says, source, alt, small, veil, mark)


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
