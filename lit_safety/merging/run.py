"""From the experts to the result: measure the base model if the method needs it, then merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_safety.backbones.backbone import Backbone
from lit_safety.core.errors import UserError
from lit_safety.core.progress import counter
from lit_safety.merging.calibration import calibrate
from lit_safety.merging.experts import Expert, united_layers
from lit_safety.merging.grams import look
from lit_safety.merging.kept import Keeper, KeptExpert, KeptStatistics, Used, fingerprint, prompt_hash
from lit_safety.merging.merge_experts import Merged, merge_experts, merge_looked
from lit_safety.merging.options import NEED_NOTHING, CalibrationOptions, Recipe
from lit_safety.merging.own_prompts import categories_of, own_prompts
from lit_safety.merging.regmean import Grams


@dataclass
class Outcome:
    """The result of a merge."""

    merged: dict[float, Merged]
    """The merges by mu; a single one for methods without mu."""
    measured: dict[str, Any] | None = None
    """What a report says about the measurement."""
    used: Collection[str] = ()
    """The prompts of the measurement; use `in` to test a prompt."""
    statistics: Path | None = None
    """The folder of the kept statistics."""
    seconds: dict[str, float] = field(default_factory=lambda: {"calibration": 0.0, "merging": 0.0})


def run(
    experts: Sequence[Expert],
    recipe: Recipe,
    backbone: Callable[[], tuple[Backbone, str]],
    source: str | Sequence[str] | None,
    options: CalibrationOptions,
    mus: Sequence[float] = (),
    keeper: Keeper | None = None,
    kept: KeptStatistics | None = None,
) -> Outcome:
    """Merge experts; with regmean once for each mu.

    Args:
        experts: in any order; those that `kept` holds are merged too.
        recipe: how they are merged.
        backbone: returns the base model on the device to compute on, and its name for the report; called only if
            needed.
        source: the calibration's prompts; None: none are given.
        options: how the measurement is made.
        mus: for regmean: values of mu in place of the recipe's; empty: the recipe's.
        keeper: for regmean: keeps the statistics.
        kept: for regmean: statistics of earlier experts, which are not measured again.

    Raises:
        UserError: the method needs prompts and none are given, or experts do not fit each other or the base.
    """
    outcome = Outcome({})
    if keeper is None and kept is None and not recipe.looks(len(experts)):
        outcome.merged[recipe.mu] = _plain(experts, recipe, None, outcome)
        return outcome
    if source is None:
        raise UserError(needs_prompts(recipe))
    begun = time.monotonic()
    if not recipe.clean_inputs:
        model, name = backbone()
        activity, measured = calibrate(model, experts, source, options)
        outcome.measured = {**measured, "pipeline": name}
        outcome.seconds["calibration"] = time.monotonic() - begun
        outcome.merged[recipe.mu] = _plain(experts, recipe, activity, outcome)
        return outcome
    names = sorted(expert.name for expert in experts)
    if kept is not None:
        options = kept.options(options)
    prompts = own_prompts(source, names, recipe, options, None if kept is None else kept.clean)
    earlier = [] if kept is None else kept.experts
    outcome.used = Used(prompts.all(), (one for kept_one in earlier for one in kept_one.prompts))
    model, name = backbone()
    base = {}
    if keeper is not None or kept is not None:
        base = fingerprint(model.parts.source, model.DENOISER, model.ENCODERS)
    if kept is not None:
        kept.check_base(base)
    every = [*(one.expert for one in earlier), *experts]
    looked = look(model, every, prompts, recipe, options, kept, keeper)
    outcome.measured = {"prompts": source, **looked.about, "pipeline": name}
    recipes = [replace(recipe, mu=mu) for mu in (mus or [recipe.mu])]
    groups = _clocked(looked.groups, outcome.seconds)
    merged = merge_looked(every, recipes, groups)
    outcome.merged = {one.mu: found for one, found in zip(recipes, merged, strict=True)}
    outcome.seconds["merging"] = time.monotonic() - begun - outcome.seconds["calibration"]
    if keeper is not None:
        about = categories_of(names, options)
        new = [
            KeptExpert(one, recipe.weight(one.name), about.get(one.name), [*map(prompt_hash, prompts.own[one.name])])
            for one in sorted(experts, key=lambda one: one.name)
        ]
        outcome.statistics = keeper.finish(new, prompts.clean, options, base)
    return outcome


def needs_prompts(recipe: Recipe) -> str:
    """The message for a merge without the prompts that it needs."""
    if recipe.own_inputs:
        return (
            "regmean measures the layers' inputs: give --calibration.prompts (a file with the columns prompt, kind "
            "and category that also contains clean prompts, or a folder of shards), or another --method: "
            f"{NEED_NOTHING} need none"
        )
    if recipe.clean_inputs:
        return "--null_space needs clean prompts: give --calibration.prompts (a file with the columns prompt and kind)"
    return (
        "comerge compares the experts on prompts: give --calibration.prompts (a CSV with a column `prompt`, or a "
        f"folder of shards), or another --method: {NEED_NOTHING} need none"
    )


def _plain(experts: Sequence[Expert], recipe: Recipe, activity: Any, outcome: Outcome) -> Merged:
    begun = time.monotonic()
    with counter("merging layers", len(united_layers(experts))) as tick:
        merged = merge_experts(experts, recipe, activity, tick)
    outcome.seconds["merging"] = time.monotonic() - begun
    return merged


def _clocked(groups: Iterator[dict[str, Grams]], seconds: dict[str, float]) -> Iterator[Mapping[str, Grams]]:
    """The groups; the time to measure them is added to ``seconds``."""
    while True:
        begun = time.monotonic()
        group = next(groups, None)
        seconds["calibration"] += time.monotonic() - begun
        if group is None:
            return
        yield group
