"""What a merge did, as JSON beside the weights and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lit_safety.merging.expert import Expert
from lit_safety.merging.merge_experts import Fit, Merged
from lit_safety.merging.recipe import Recipe

#: By this a folder is known to be a merge's own.
FORMAT = "lit_safety merge 1"


def report(
    merged: Merged,
    experts: Sequence[Expert],
    recipe: Recipe,
    calibration: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that `report.json` says but the file's size.

    Args:
        merged: what came out.
        experts: what went in.
        recipe: how.
        calibration: what comerge measured on.
        seconds: how long each part took, reading and writing left out.
    """
    return {
        "format": FORMAT,
        "recipe": {
            **asdict(recipe),
            "weights": {e.name: recipe.weight(e.name) for e in experts},
            "scale": recipe.scale_of(len(experts)),
        },
        "experts": {
            expert.name: {
                **expert.provenance,
                "layers": len(expert.layers),
                "ranks": sorted({layer.rank for layer in expert.layers.values()}),
            }
            for expert in sorted(experts, key=lambda expert: expert.name)
        },
        "calibration": dict(calibration) if calibration is not None else None,
        "residual": merged.residual,
        "seconds": {name: round(taken, 3) for name, taken in seconds.items()},
        "parameters": sum(layer.a.numel() + layer.b.numel() for layer in merged.layers.values()),
        "layers": {name: _layer(fit) for name, fit in merged.fits.items()},
    }


def _layer(fit: Fit) -> dict[str, Any]:
    told = {"rank": fit.rank, "norm": fit.norm, "residual": fit.residual, "scale": fit.scale}
    return told if fit.rows is None else {**told, "rows": dict(fit.rows)}


def table(merged: Merged) -> str:
    """Ranks and relative Frobenius residuals, layers summed up by block; every single layer stands in report.json."""
    blocks: dict[str, list[Fit]] = {}
    for name, fit in merged.fits.items():
        blocks.setdefault(_block(name), []).append(fit)
    rows: list[tuple[str, ...]] = [("block", "layers", "rank", "residual", "largest")]
    rows += [_row(name, fits) for name, fits in blocks.items()]
    rows.append(_row("all", list(merged.fits.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    shares = _shares(merged)
    if shares:
        lines += ["", "taken from  " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())]
    return "\n".join(lines)


def _block(name: str) -> str:
    """`unet.down_blocks.1.attentions...` -> `unet.down_blocks.1`"""
    parts = name.split(".")
    return ".".join(parts[: 3 if len(parts) > 2 and parts[2].isdigit() else 2])


def _row(name: str, fits: Sequence[Fit]) -> tuple[str, ...]:
    ranks = sorted({fit.rank for fit in fits})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    residual = Merged({}, {str(number): fit for number, fit in enumerate(fits)}).residual
    return name, str(len(fits)), rank, f"{residual:.2e}", f"{max(fit.residual for fit in fits):.2e}"


def _shares(merged: Merged) -> dict[str, float]:
    """comerge: the share of all rows (or weights) that each expert gives."""
    counted = [fit.rows for fit in merged.fits.values() if fit.rows is not None]
    total = sum(sum(rows.values()) for rows in counted)
    return {name: sum(rows[name] for rows in counted) / total for name in counted[0]} if counted else {}
