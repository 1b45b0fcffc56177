"""From experts that were read to what is written: look at the base model where the method asks for it, then merge."""

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
    """What came out of a merge."""

    merged: dict[float, Merged]
    """By mu; of a method without mu a single one."""
    measured: dict[str, Any] | None = None
    """What a report says of how the model was looked at."""
    used: Collection[str] = ()
    """The prompts that it was looked at with; `in` tells."""
    statistics: Path | None = None
    """The folder of what is kept."""
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
    """Merge experts, by regmean once for each mu.

    Args:
        experts: in any order; those that `kept` holds are merged too.
        recipe: how.
        backbone: gives the base model on the device to compute on, and what a report calls it; called if it is needed.
        source: the calibration's prompts; None: there are none.
        options: how they are looked at.
        mus: of regmean, in place of the recipe's own; empty: that one.
        keeper: of regmean, where what is measured is kept.
        kept: of regmean, what was measured of other experts, which are not looked at again.

    Raises:
        UserError: no prompts where the method needs them, or experts that do not fit each other or the base.
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
    """The line for a merge without the prompts that it needs."""
    if recipe.own_inputs:
        return (
            "regmean looks at what the layers are fed with: give --calibration.prompts (a file with the columns "
            "prompt, kind and category, in which there are clean prompts too, or a folder of shards), or "
            f"another --method: {NEED_NOTHING} need none"
        )
    if recipe.clean_inputs:
        return (
            "--null_space looks at clean prompts: give --calibration.prompts (a file with the columns prompt and kind)"
        )
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
    """The groups; how long each took to measure is added up."""
    while True:
        begun = time.monotonic()
        group = next(groups, None)
        seconds["calibration"] += time.monotonic() - begun
        if group is None:
            return
        yield group
