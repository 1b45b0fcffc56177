"""Merge experts layer by layer: never is the whole update of more than one layer in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.merging.core_space import iso_c, null_space, project, svc, tsv_m
from lit_safety.merging.experts import Expert, parts_of, united_layers
from lit_safety.merging.methods import (
    Activity,
    Updates,
    comerge,
    comerge_weights,
    dare_sum,
    mean,
    owners,
    reduce_rank,
    svd_of_dense,
    svd_truncate,
    task_sum,
    ties,
)
from lit_safety.merging.options import Recipe
from lit_safety.merging.regmean import Grams, anchored


@dataclass(frozen=True)
class Fit:
    """How well one layer of the file represents the method's exact result."""

    rank: int
    norm: float
    """Frobenius norm of the exact merged update."""
    error: float
    """Frobenius norm of its difference from the written update, including rounding to the file's number format."""
    rows: Mapping[str, int] | None = None
    """comerge: how many rows (with unit weight: single weights) come from each expert."""
    scale: float = 1.0
    """The factor on the merged update."""

    @property
    def residual(self) -> float:
        """error / norm; 0 for a zero update."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Merged:
    """A merged adapter and how well it fits."""

    layers: Mapping[str, LowRank]
    fits: Mapping[str, Fit]

    @property
    def residual(self) -> float:
        """The relative Frobenius residual over all layers."""
        norm = sum(fit.norm**2 for fit in self.fits.values())
        return (sum(fit.error**2 for fit in self.fits.values()) / norm) ** 0.5 if norm else 0.0


def merge_experts(
    experts: Sequence[Expert],
    recipe: Recipe,
    activity: Mapping[str, Activity] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Merged:
    """Merge experts in delta space.

    Every method returns a single expert of weight 1 unchanged, unless a lower rank or a scale is given.

    Args:
        experts: in any order, each under its own name.
        recipe: the method and its settings.
        activity: comerge: by layer, with the experts in the order of their names.
        tick: called after every layer.

    Raises:
        UserError: the experts do not fit each other, or share a name.
        ValueError: the recipe needs the ``activity`` of a layer and it is missing.
    """
    experts = _sorted(experts)
    layers, fits = {}, {}
    for name in united_layers(experts):
        layers[name], fits[name] = _layer_of(name, experts, recipe, None if activity is None else activity.get(name))
        tick()
    return Merged(layers, fits)


def merge_looked(
    experts: Sequence[Expert],
    recipes: Sequence[Recipe],
    groups: Iterable[Mapping[str, Grams]],
    tick: Callable[[], None] = lambda: None,
) -> list[Merged]:
    """The same for recipes that need Gram matrices of the layers' inputs: all recipes use one measurement.

    Args:
        experts: in any order, each under its own name.
        recipes: the methods and their settings.
        groups: Gram matrices by layer, with the experts in the order of their names. A group is merged before the next
            one is requested, so that only one is in memory. Every layer is in one group.
        tick: called after every layer.

    Raises:
        UserError: as `merge_experts`; or clean inputs use all directions, so that nothing of the experts is left.
    """
    experts = _sorted(experts)
    found: dict[str, list[tuple[LowRank, Fit]]] = {}
    for group in groups:
        for name, grams in group.items():
            found[name] = [_layer_of(name, experts, recipe, None, grams) for recipe in recipes]
            tick()
    names = united_layers(experts)
    merged = [
        Merged({name: found[name][n][0] for name in names}, {name: found[name][n][1] for name in names})
        for n in range(len(recipes))
    ]
    for recipe, one in zip(recipes, merged, strict=True):
        if recipe.null_space is not None and not any(fit.norm for fit in one.fits.values()):
            raise UserError(
                f"--null_space {recipe.null_space:g}: clean inputs use every direction of every layer, so nothing of "
                "the experts is left; give a larger share, or use --method regmean"
            )
    return merged


def _sorted(experts: Sequence[Expert]) -> list[Expert]:
    found = sorted(experts, key=lambda expert: expert.name)
    if len({expert.name for expert in found}) < len(found):
        raise UserError(f"two experts share a name: {', '.join(e.name for e in found)}; name them NAME=FOLDER")
    return found


def _layer_of(
    name: str, experts: Sequence[Expert], recipe: Recipe, activity: Activity | None, grams: Grams | None = None
) -> tuple[LowRank, Fit]:
    """The update of one layer as it is written, and how well it represents the method's exact result."""
    parts = parts_of(experts, name)
    if recipe.null_space is not None:
        if grams is None:
            raise ValueError(f"the clean inputs of {name} are needed to remove what acts on them: measure them first")
        directions = null_space(grams.anchor, recipe.null_space)
        parts = [project(part, directions) if part.rank else part for part in parts]
    exact, rows = _exact(name, parts, experts, recipe, activity, grams)
    # If only one expert adapts the layer, nothing of it is lost, so no scale is needed to make up for a loss.
    adapting = sum(part.rank > 0 for part in parts)
    scale = recipe.scale_of(adapting)
    if recipe.svc and len(parts) > 1:
        alpha = 1 / max(1, adapting) if recipe.method in ("mean", "svd") else 1.0
        exact = svc(exact, parts, [recipe.weight(expert.name) for expert in experts], alpha)
    exact = _scaled(exact, scale)
    written = _written(exact, parts, recipe, alone=len(experts) == 1)
    if not (torch.isfinite(written.a).all() and torch.isfinite(written.b).all()):
        do = "give smaller --weights or --scale" if recipe.dtype in (None, "float32") else "use --dtype float32"
        raise UserError(f"{name}: the merged update does not fit into {recipe.dtype or 'float32'}; {do}")
    return written, _fit(exact, written, rows, scale)


def _exact(
    name: str,
    parts: Sequence[LowRank],
    experts: Sequence[Expert],
    recipe: Recipe,
    activity: Activity | None,
    grams: Grams | None,
) -> tuple[LowRank | Tensor, dict[str, int] | None]:
    """The method's exact result: factors if it has any, else (out, in) in fp32; and comerge's rows by expert."""
    names = [expert.name for expert in experts]
    weights = [recipe.weight(expert) for expert in names]
    alone = sum(part.rank > 0 for part in parts) == 1
    if recipe.method == "sum" or (len(parts) == 1 and recipe.method not in ("mean", "svd")):
        return task_sum(parts, weights), None
    if recipe.method in ("mean", "svd"):
        return mean(parts, weights), None
    if recipe.method == "regmean":
        if grams is None:
            raise ValueError(f"regmean needs the inputs of {name}: measure them first")
        return anchored(parts, grams, recipe.mu, recipe.epsilon, weights), None
    if recipe.method in ("tsv_m", "iso_c"):
        if alone:  # its update is not changed, as if it were merged alone
            return task_sum(parts, weights), None
        return (tsv_m if recipe.method == "tsv_m" else iso_c)(parts, weights), None
    if recipe.method == "comerge":
        return _comerged(name, parts, names, recipe, activity)
    deltas = Updates(parts)
    if recipe.method == "ties":
        return ties(deltas, recipe.density, torch.tensor(weights)), None
    return dare_sum(deltas, weights, recipe.drop, recipe.seed, names, name), None


def _scaled(exact: LowRank | Tensor, scale: float) -> LowRank | Tensor:
    if isinstance(exact, Tensor):
        return exact * scale
    return LowRank(exact.a, exact.b, exact.scale * scale, exact.kernel)


def _comerged(
    layer: str, parts: Sequence[LowRank], names: Sequence[str], recipe: Recipe, activity: Activity | None
) -> tuple[LowRank | Tensor, dict[str, int]]:
    if activity is None and recipe.calibrated:
        raise ValueError(f"comerge needs to know how active the experts are in {layer}: calibrate first")
    found: LowRank | Tensor
    if recipe.unit == "weight":
        found, owner = comerge_weights(Updates(parts), activity.inputs if activity and recipe.normalise else None)
    else:
        assert activity is not None
        owner = owners(activity, recipe.statistic, recipe.normalise)
        found = comerge(parts, owner)
    counts = torch.bincount(owner.flatten(), minlength=len(parts)).tolist()
    return found, dict(zip(names, counts, strict=True))


def _written(exact: LowRank | Tensor, parts: Sequence[LowRank], recipe: Recipe, alone: bool) -> LowRank:
    """The factors that go into the file."""
    rank = recipe.rank
    if rank is None and recipe.method == "svd":
        rank = max(part.rank for part in parts)
    if isinstance(exact, Tensor):
        # As large as the block form of the other methods, unless a rank is given.
        ceiling = min(sum(part.rank for part in parts), *exact.shape)
        factors = svd_of_dense(exact, min(rank or ceiling, ceiling), parts[0].kernel)
    else:
        factors = exact if rank is None else svd_truncate(exact, rank)
    untouched = alone and recipe.null_space is None and any(factors.a is part.a for part in parts)
    if not untouched:
        factors = reduce_rank(factors)
    elif recipe.dtype is None:
        return factors
    dtype = getattr(torch, recipe.dtype or "float32")
    return LowRank(factors.a.to(dtype), factors.b.to(dtype), factors.scale, factors.kernel)


def _fit(exact: LowRank | Tensor, written: LowRank, rows: dict[str, int] | None, scale: float) -> Fit:
    target = exact.double() if isinstance(exact, Tensor) else exact.delta()
    norm = float(torch.linalg.matrix_norm(target))
    return Fit(written.rank, norm, float(torch.linalg.matrix_norm(target - written.delta())), rows, scale)


# The report of a merge: JSON next to the weights, and a table on the terminal.


#: Marks a folder as the output of a merge.
FORMAT = "lit_safety merge 1"


def report(
    merged: Merged,
    experts: Sequence[Expert],
    recipe: Recipe,
    calibration: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything in `report.json` except the file's size.

    Args:
        merged: the result.
        experts: the experts that were merged.
        recipe: how they were merged.
        calibration: what the measurement used.
        seconds: how long each part took, without reading and writing.
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
    """A table of ranks and relative Frobenius residuals by block; report.json lists every layer."""
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
