"""The results of `explain` as lines and as a page with heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_safety.report import page as html
from lit_safety.report.charts import heatmap_svg
from lit_safety.report.page import Block, ChartFigure, Charts, Fold, Heading, Settings, Table, Text, Tile, Tiles

COMES_BACK, AS_RANDOM, NOTHING = (
    "harm comes back, beyond random knock-outs of this size",
    "harm comes back, as after random knock-outs of this size",
    "no change seen",
)
NO_CONTROL = "harm comes back; no other random set of this size"


def said_of(knocked: Mapping[str, Any]) -> str:
    """What a knock-out shows.

    Harm comes back if the whole interval of its change is above 0. This is beyond chance if the same holds against
    every random knock-out.
    """
    change = knocked["harm_change"]
    if change is None or change["interval"][0] <= 0:
        return NOTHING
    if not knocked["controls"]:
        return NO_CONTROL
    beyond = all(
        one["harm_beyond"] is not None and one["harm_beyond"]["interval"][0] > 0 for one in knocked["controls"]
    )
    return COMES_BACK if beyond else AS_RANDOM


TITLES = {"blocks": "Blocks", "kinds": "Kinds of layers", "layers": "Layers", "times": "Steps"}

MOST_ROWS = 20
"""The most rows of a heat map. With more it could not be read, so there is only the table."""


def explain_page(content: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        content: the content of explain.json.
    """
    settings = content["settings"]
    blocks: list[Block] = [
        Tiles(
            [
                Tile("harm, base", in_percent(content["base"]["harm"]), "of prompts that ask for it"),
                Tile("harm, adapter", in_percent(content["adapter"]["harm"]), "the same prompts and seeds"),
                Tile("what must stay, base", in_percent(content["base"]["kept"]), "of harmless prompts"),
                Tile("what must stay, adapter", in_percent(content["adapter"]["kept"]), "the same prompts and seeds"),
            ]
        ),
        Heading("Does the place matter?"),
        Text(_places(content)),
        Heading("Knock-outs"),
        Text(
            "The adapter is switched off in one part, or works in one part alone. For comparison there are random "
            "knock-outs of as many layers and nearly the same energy, or of as many steps. Harm is the share of "
            "harmful images among those of prompts that ask for harm."
        ),
    ]
    for group in dict.fromkeys(one["group"] for one in content["knock_outs"]):
        own = [one for one in content["knock_outs"] if one["group"] == group]
        chart = [Charts([_knock_outs(group, own)])] if len(own) <= MOST_ROWS else []
        blocks += [Heading(TITLES[group], 3), *chart, _knock_out_table(group, own)]
    blocks += [*_sizes(content), *_predicts(content["predicts"]), *_energy(content["energy"])]
    blocks += [
        Heading("Settings"),
        Settings(settings),
        Fold("How the figures are made", [Settings(content["definitions"])]),
    ]
    lead = f"{settings['adapter']} on {settings['pipeline']}, {settings['layers']} layers."
    return html.page("Where an adapter acts", "lit_safety explain", "Where and when does it act?", lead, blocks)


def _places(content: Mapping[str, Any]) -> str:
    beyond = [one["name"] for one in content["knock_outs"] if one["says"] == COMES_BACK]
    alike = [one["name"] for one in content["knock_outs"] if one["says"] == AS_RANDOM]
    said = [
        f"Without {', '.join(beyond)} harm comes back, beyond random knock-outs of the same size."
        if beyond
        else "No part brings harm back by more than random knock-outs of the same size. So these figures do not show "
        "that safety depends on one part of this adapter."
    ]
    if alike:
        said.append(
            f"Without {', '.join(alike)} harm comes back as after random knock-outs, because of the size alone."
        )
    return " ".join(said)


def _value(found: Mapping[str, Any] | None) -> float | None:
    return None if found is None or found["value"] is None else 100 * found["value"]


def _knock_outs(group: str, rows: Sequence[Mapping[str, Any]]) -> ChartFigure:
    numbers: dict[str, dict[str, float | None]] = {}
    for one in rows:
        beside = [value for control in one["controls"] if (value := _value(control["harm"])) is not None]
        numbers[one["name"]] = {
            "harm without it": _value(one["harm"]),
            "without random ones": sum(beside) / len(beside) if beside else None,
            "with it alone": _value((one.get("alone") or {}).get("harm")),
            "kept without it": _value(one["kept"]),
        }
    title = f"Knock-outs: {TITLES[group].lower()} (% of images)"
    says = "; ".join(f"{name}: {', '.join(f'{k} {v:.0f}%' for k, v in row.items() if v is not None)}"
                     for name, row in numbers.items())  # fmt: skip
    return ChartFigure(heatmap_svg(numbers, f"knock-outs-{group}", title, says, ".0f", 100.0), title)


def _knock_out_table(group: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for one in rows:
        size = f"{one['layers']} layers, {100 * one['energy']:.0f}% of the energy" if one["layers"] else (
            f"{len(one['steps'])} steps")  # fmt: skip
        beside = "; ".join(map(_control, one["controls"])) or "no other set of this size"
        alone = in_percent(one["alone"]["harm"]) if "alone" in one else "-"
        cells.append([one["name"], size, in_percent(one["harm"]), beside, alone, in_percent(one["kept"]), one["says"]])
    head = ["without", "size", "harm", "harm without random ones", "harm with it alone", "kept", "says"]
    return Table(head, cells, TITLES[group])


def _control(one: Mapping[str, Any]) -> str:
    shared = f" ({one['shared']} of its layers)" if one.get("shared") else ""
    return f"{in_percent(one['harm'])}{shared}"


def _sizes(content: Mapping[str, Any]) -> list[Block]:
    kinds = content["sizes"]
    steps = content["settings"]["steps"]
    ranges = content["settings"]["ranges"]
    spans = [[step + 1 for step in range(steps) if step * ranges // steps == at] for at in range(ranges)]
    columns = [f"steps {span[0]} to {span[-1]}" for span in spans]
    by_time = {kind: dict(zip(columns, found["ranges"], strict=True)) for kind, found in kinds.items()}
    clean = kinds.get("clean")
    charts = [_heat("sizes-time", "Size of the update by kind of prompt and steps", by_time)]
    blocks = dict.fromkeys(block for found in kinds.values() for block in found["blocks"])
    by_block = {
        kind: {block: _mean(found["blocks"].get(block, ())) for block in blocks} for kind, found in kinds.items()
    }
    charts.append(_heat("sizes-blocks", "Size of the update by kind of prompt and block", by_block))
    if clean is not None:
        gate = {
            kind: {block: _over(by_block[kind][block], by_block["clean"][block]) for block in blocks}
            for kind in kinds if kind != "clean"
        }  # fmt: skip
        if gate:
            charts.append(_heat("gate-blocks", "Gate ratio by block: the size over that on clean prompts", gate))
    rows = [
        [kind, str(found["n"]), "-" if found["all"] is None else f"{found['all']:.4f}",
         "-" if content["gate"][kind] is None else f"{content['gate'][kind]:.3f}", in_percent(found["harm"])]
        for kind, found in kinds.items()
    ]  # fmt: skip
    return [
        Heading("How strongly it acts, and on which prompts"),
        Text(
            "The size of the update is the norm of what it adds to a layer's output, divided by the norm of that "
            "output. At a gate ratio of 1 it acts on these prompts as strongly as on clean ones."
        ),
        Charts(charts),
        Table(["prompts", "n", "size", "gate ratio", "harm"], rows, "Sizes"),
    ]


def _heat(name: str, title: str, numbers: Mapping[str, Mapping[str, float | None]]) -> ChartFigure:
    says = "; ".join(f"{row}: {', '.join(f'{k} {v:.3f}' for k, v in cells.items() if v is not None)}"
                     for row, cells in numbers.items())  # fmt: skip
    return ChartFigure(heatmap_svg(numbers, name, title, says, ".3f"), title)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _predicts(found: Mapping[str, Any]) -> list[Block]:
    by = {"size of the update": "size", "size of the base's outputs alone (a control)": "base_alone"}
    rows = [[name, _area(found[key])] for name, key in by.items()]
    blocks: list[Block] = [
        Heading("Does it predict which prompts give harm?"),
        Text(
            "Over prompts that ask for harm and, if given, texts that attacks found: the share of pairs of a harmful "
            "and a safe image in which the harmful one has the larger value. 50% is chance; below 50%, harmful images "
            "have the smaller values."
        ),
        Table(["by", "area under the curve"], rows, "Prediction"),
    ]
    if found["attacks"]:
        cells = [[one["attack"], f"{one['size']:.4f}", f"{100 * one['asr']:.1f}%"] for one in found["attacks"]]
        blocks.append(Table(["attack", "size on its texts", "its success rate"], cells, "Attacks"))
        rank = found["rank_correlation"]
        said = "too few for a correlation" if rank is None else f"Spearman's rank correlation {rank:.2f}"
        blocks.append(Text(f"Over {len(cells)} attacks: {said}."))
    return blocks


def _area(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return f"not known: {found['hits']} images are harmful and {found['others']} are not"
    low, high = found["interval"]
    return (
        f"{100 * found['value']:.1f}% [{100 * low:.1f}, {100 * high:.1f}] ({found['hits']} against {found['others']})"
    )


def _energy(layers: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Block]:
    from lit_safety.dossier.acting import block_of

    blocks: dict[str, list[Sequence[Mapping[str, float]]]] = {}
    for layer, found in layers.items():
        blocks.setdefault(block_of(layer), []).append(found)
    numbers: dict[str, dict[str, float | None]] = {}
    for block, own in blocks.items():
        row: dict[str, float | None] = {}
        for at, one in enumerate(own[0]):
            share = f"{100 * one['share']:.0f}%"
            row[f"within {share}"] = _mean([found[at]["energy"] for found in own])
            row[f"random, {share}"] = _mean([found[at]["random"] for found in own])
        numbers[block] = row
    if not numbers:
        return []
    return [
        Heading("The update and the base's leading directions"),
        Text(
            "The share of the update's energy in the leading left singular vectors of the base weight, which hold the "
            "named share of the weight's own energy, and that of a random update. Means over a block's layers."
        ),
        Charts([_heat("energy", "Energy within the leading directions", numbers)]),
    ]


def in_percent(found: Mapping[str, Any]) -> str:
    """`2.1% [0.8, 4.0]`, or `not measured`."""
    if found["value"] is None:
        return "not measured"
    low, high = found["interval"]
    return f"{100 * found['value']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def told(content: Mapping[str, Any]) -> list[str]:
    """The results as lines."""
    lines = [f"harm: base {in_percent(content['base']['harm'])}, adapter {in_percent(content['adapter']['harm'])}"]
    for one in content["knock_outs"]:
        beside = "; ".join(in_percent(control["harm"]) for control in one["controls"])
        lines.append(f"without {one['name']}: {in_percent(one['harm'])} (random: {beside or 'none'}): {one['says']}")
    lines += [f"gate ratio, {kind}: {ratio:.3f}" for kind, ratio in content["gate"].items() if ratio is not None]
    return lines
