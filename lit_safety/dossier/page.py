"""The page of a dossier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_safety.dossier.figures import Row
from lit_safety.dossier.summary import NOT_RUN, share
from lit_safety.evaluation.attack_curves import attack_blocks
from lit_safety.report import page as html
from lit_safety.report.page import Alarm, Block, Fold, Heading, Settings, Table, Text, Tile, Tiles

#: Key of a summary's arm -> its heading, and the text if the part is empty.
PARTS = {
    "fell": ("What fell", "No rate of harm fell by more than its interval."),
    "not_fallen": ("What did not fall", ""),
    "held": ("What held", ""),
    "lost": ("What was lost", "No figure of what must stay fell by more than its interval."),
    "attacks_that_brought_harm_back": ("Attacks that brought harm back on half of the prompts or more", "None of the "
                                       "attacks that were run."),
    "attacks_that_did_not": ("Attacks that did not", ""),
}  # fmt: skip
INDEX = "index.html"


def dossier_page(content: Mapping[str, Any], attacks: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        content: of dossier.json.
        attacks: step -> its attacks.json.
    """
    said = content["summary"]
    blocks: list[Block] = [
        Tiles(_tiles(content)),
        *_failures(content),
        Heading("Summary"),
        Text(said["asked"]),
        Text(said["judge"]),
    ]
    for arm, parts in said["arms"].items():
        blocks.append(Heading(f"{arm}, compared with the base", 3))
        blocks += [Text(sentence) for sentence in parts["in_plain_words"]]
        for key, (heading, nothing) in PARTS.items():
            if parts[key]:
                blocks.append(Table([heading], [[one] for one in parts[key]], f"{heading}: {arm}"))
            elif nothing and _measured(content, key, arm):
                blocks.append(Text(f"{heading}: {nothing}"))
    blocks += [Text(said["limits"], soft=True), Heading("What was run"), _steps(content), *_judge(content["judge"])]
    blocks += _figures(content["figures"])
    blocks += _attack_table(content["attacks"])
    for step, report in attacks.items():
        curves = attack_blocks(report, list(report["protocol"]["arms"]))
        blocks += [Fold(f"Curves of {step}", curves)] if curves else []
    blocks += [
        Heading("How to repeat it"),
        Text(
            "The command of the dossier, and the command of each step. A step's folder holds its figures and a page; "
            "the verdict on every image is in its verdicts.csv."
        ),
        Table(["step", "command"], [["all", content["command"]], *_commands(content)], "Commands"),
        Heading("Hashes and versions"),
        Text("sha256 of weights, data, code and results. The table of figures is also in table.csv.", soft=True),
        Settings(_hashes(content)),
        Text(_times(content), soft=True),
    ]
    lead = f"{content['title']}: {', '.join(_arms(content))}. Judge: {content['asked']['judge']}."
    return html.page("Safety dossier", "lit_safety dossier", f"How safe is {content['asked']['model']}?", lead, blocks)


def _arms(content: Mapping[str, Any]) -> list[str]:
    return ["base", *content["summary"]["arms"]]


def _measured(content: Mapping[str, Any], key: str, arm: str) -> bool:
    """Whether any measured figure could belong to this part."""
    if key.startswith("attacks"):
        return any(row["arm"] == arm and "not_applicable" not in row for row in content["attacks"])
    return any(arm in row["changes"] for row in content["figures"])


def _tiles(content: Mapping[str, Any]) -> list[Tile]:
    states = [step["state"] for step in content["steps"].values()]
    done = states.count("done")
    tiles = [Tile("steps that were run", f"{done} of {len(states)}", "each of the others is listed with the reason")]
    for figure in ("ip", "any_of/explicit", "named_recall/harmless", "unnamed_recall/harmless"):
        for row in content["figures"]:
            known = {arm: found for arm, found in row["arms"].items() if found["value"] is not None}
            if row["figure"] == figure and "base" in known and len(known) > 1:
                after = next(arm for arm in known if arm != "base")
                shift = " \u2192 ".join(f"{100 * known[arm]['value']:.1f}%" for arm in ("base", after))
                tiles.append(Tile(row["title"], shift, f"base \u2192 {after}; {row['better']} is better"))
                break
    return tiles


def _failures(content: Mapping[str, Any]) -> list[Block]:
    items = [f"{name}: {step['reason']}" for name, step in content["steps"].items() if step["state"] == NOT_RUN]
    return [Alarm("Not run", items, "This page has no figures of these steps.")] if items else []


def _steps(content: Mapping[str, Any]) -> Block:
    rows = []
    for name, step in content["steps"].items():
        left = f" Left out: {', '.join(step['left_out'])}." if step["left_out"] else ""
        state = step["state"] if step["state"] == "done" else f"{NOT_RUN}: {step['reason']}"
        rows.append([name, f"{step['about']}{left}", step["protocol"], state, step["folder"]])
    return Table(["step", "what it measures", "protocol", "state", "folder"], rows, "Steps")


def _judge(judge: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("The judge")]
    if "missing" in judge:
        return [*blocks, Text(f"How often it is right was not measured: {judge['missing']}.")]
    rows = [["all", _share(judge["sensitivity"]), _share(judge["specificity"])]]
    rows += [[name, _share(one["sensitivity"]), _share(one["specificity"])]
             for name, one in judge["by_category"].items()]  # fmt: skip
    head = ["labelled images", "harmful images that it calls harmful", "safe images that it calls safe"]
    blocks += [
        Text(f"{judge['judge']} on {judge['n']} labelled images ({judge['file']})."),
        Table(head, rows, "The judge on labelled images"),
        Text(judge["caveat"], soft=True),
    ]
    if judge["not_judged"]:
        left = ", ".join(f"{name} ({count} images)" for name, count in judge["not_judged"].items())
        blocks.append(Text(f"Not judged, because the judge cannot see this harm: {left}."))
    if judge["agreement"]:
        beside = [[one["judges"][1], _share(one)] for one in judge["agreement"]]
        blocks.append(Table(["another judge", "share of images with the same verdict"], beside, "Other judges"))
    return blocks


def _share(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "not measured"
    errors = f" +{found['errors']} errors" if found["errors"] else ""
    return f"{share(found)} of {found['n']}{errors}"


def _figures(rows: Sequence[Row]) -> list[Block]:
    if not rows:
        return []
    blocks: list[Block] = [
        Heading("The figures"),
        Text(
            "The name of each figure is that in the step's file. Changes are paired: same prompts, same seeds. "
            "`corrected` is the rate after correction for the judge's known error.",
            soft=True,
        ),
    ]
    for step in dict.fromkeys(row["step"] for row in rows):
        own = [row for row in rows if row["step"] == step]
        arms = list(dict.fromkeys(arm for row in own for arm in row["arms"]))
        head = ["figure", *arms, *(f"{arm} - base" for arm in arms if arm != "base"), "better"]
        blocks += [Heading(f"{step} ({own[0]['file']})", 3), Table(head, [_cells(row, arms) for row in own], step)]
    return blocks


def _cells(row: Row, arms: Sequence[str]) -> list[str]:
    cells = [f"{row['title']} ({row['figure']})"]
    for arm in arms:
        found = row["arms"].get(arm)
        cells.append("-" if found is None else _cell(row, found))
    for arm in arms:
        if arm != "base":
            cells.append(_change(row, row["changes"].get(arm)))
    return [*cells, row["better"]]


def _cell(row: Row, found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return str(found.get("absent", "none"))
    if row.get("unit"):
        interval = found["interval"]
        spread = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
        return f"{found['value']:.2f}{spread} of {found['n']}"
    right = found.get("corrected")
    more = f"; corrected {share(right)}" if right is not None and right["value"] is not None else ""
    return f"{_share(found)}{more}"


def _change(row: Row, change: Mapping[str, Any] | None) -> str:
    if change is None or change["value"] is None or change["interval"] is None:
        return "-"
    scale, digits = (1, 2) if row.get("unit") else (100, 1)
    low, high = change["interval"]
    return (f"{scale * change['value']:+.{digits}f} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]: "
            f"{change['says']}")  # fmt: skip


def _attack_table(rows: Sequence[Row]) -> list[Block]:
    if not rows:
        return []
    cells = []
    for row in rows:
        if "not_applicable" in row:
            cells.append(
                [row["attack"], row["arm"], row["step"], f"does not apply: {row['not_applicable']}", "", "", "", ""]
            )
            continue
        before, top, post = row["unattacked"], row["strongest"], row["of_those_safe_before"]
        half = "never" if row["half_at"] is None else f"{row['half_at']:g}"
        budget = f"{row['budget']:g}" if isinstance(row["budget"], int | float) else str(row["budget"])
        cells.append(
            [
                row["attack"], row["arm"], row["step"], _rate(before), _rate(top), _rate(post),
                f"{row['unit']}: {budget}{', ' + row['label'] if row['label'] else ''}", half,
            ]
        )  # fmt: skip
    head = ["attack", "arm", "step", "harm unattacked", "harm at the strongest point", "of prompts safe unattacked",
            "strongest at", "half at"]  # fmt: skip
    return [
        Heading("Attacks"),
        Text(
            "Share of attacked prompts with harm. The strongest point of a curve is the attacker's best one; it was "
            "chosen after all points were measured.",
            soft=True,
        ),
        Table(head, cells, "Attacks"),
    ]


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None or found["asr"] is None:
        return "-"
    return f"{share(found, 'asr')} of {found['n']}"


def _commands(content: Mapping[str, Any]) -> list[list[str]]:
    return [[name, step["command"] or f"{NOT_RUN}: {step['reason']}"] for name, step in content["steps"].items()]


def _hashes(content: Mapping[str, Any]) -> dict[str, Any]:
    results = {
        f"{step['folder']}/{name}": value
        for step in content["steps"].values()
        for name, value in step["results"].items()
    }
    return {**content["hashes"], "results": results}


def _times(content: Mapping[str, Any]) -> str:
    times = content["times"]
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times["steps"].items())
    return f"Written {times['written']}. Time of the steps: {steps}."
