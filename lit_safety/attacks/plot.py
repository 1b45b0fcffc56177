"""attacks.png: one panel an attack, one curve an arm, with 95% intervals."""

from __future__ import annotations

import io
from typing import Any

MARKERS = "osD^vPX*<>"
MOST_TICKS = 10
WIDE = 20
"""Budgets whose largest is so many times the smallest stand on a logarithmic axis."""


def curves_png(report: dict[str, Any]) -> bytes:
    """The image of an attacks.json, as a PNG file.

    Args:
        report: the content of attacks.json.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attacks = report["attacks"]
    arms = list(report["protocol"]["arms"])
    columns = min(3, len(attacks))
    rows = -(-len(attacks) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for number, (name, attack) in enumerate(attacks.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(name, fontsize=10)
        for place, arm in enumerate(arms):
            points = [p for p in attack["arms"].get(arm, []) if p["asr"] is not None]
            if points:
                handles[arm] = _curve(axes, points, place, len(arms))
        _axis(axes, [p["budget"] for points in attack["arms"].values() for p in points])
        axes.set_xlabel(attack["budget"], fontsize=8)
        axes.set_ylim(-3, 103)
        axes.set_ylabel("ASR (%)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _curve(axes: Any, points: list[dict[str, Any]], place: int, arms: int) -> Any:
    xs, ys = [p["budget"] for p in points], [100 * p["asr"] for p in points]
    reach = [[y - 100 * p["interval"][0] for y, p in zip(ys, points, strict=True)],
             [100 * p["interval"][1] - y for y, p in zip(ys, points, strict=True)]]  # fmt: skip
    # Curves that lie on each other are told apart by marks of different size, the first arm's being the largest.
    return axes.errorbar(xs, ys, [[max(0.0, r) for r in side] for side in reach], color=f"C{place % 10}", capsize=2,
                         marker=MARKERS[place % len(MARKERS)], markersize=4 + (arms - place) * 0.8, linewidth=1.2,
                         elinewidth=0.7, alpha=0.85)  # fmt: skip


def _axis(axes: Any, budgets: list[float]) -> None:
    above = sorted({b for b in budgets if b > 0})
    if above and min(budgets) >= 0 and above[-1] / above[0] >= WIDE:
        axes.set_xscale("symlog", linthresh=above[0])
    ticks = sorted(set(budgets))
    if len(ticks) <= MOST_TICKS:  # there is nothing between budgets, such as half a paraphrase
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
