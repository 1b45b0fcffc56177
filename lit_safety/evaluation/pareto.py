"""Harm against what must stay, a point an arm: which arms no other arm beats in both."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from lit_safety.evaluation.metrics import FIGURES, NOT_JUDGED, flat
from lit_safety.evaluation.svg import Chart, share_range
from lit_safety.evaluation.table import percent, title

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
