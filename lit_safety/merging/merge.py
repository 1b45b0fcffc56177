"""The command `merge`: separately trained experts become one LoRA, and with `fuse` a whole pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.merging.options import CalibrationOptions, Recipe, TuningOptions

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone
    from lit_safety.merging.experts import Expert
    from lit_safety.merging.run import Outcome


DEFAULT_CALIBRATION = CalibrationOptions()
DEFAULT_TUNING = TuningOptions()


def merge(
    experts: list[str],
    out: str = "merged",
    pipeline: str | None = None,
    weights: list[float] | None = None,
    calibration: CalibrationOptions = DEFAULT_CALIBRATION,
    mus: list[float] | None = None,
    tune: bool = False,
    tuning: TuningOptions = DEFAULT_TUNING,
    fuse: bool = False,
    device: str | None = None,
    keep_statistics: bool = False,
    add_to: str | None = None,
    **settings: Any,
) -> None:
    """Merge LoRA experts in delta space into one that stock diffusers loads.

    Writes into `out`: pytorch_lora_weights.safetensors, report.json, README.md, and with `fuse` the folder pipeline/.
    The order of the experts does not matter. A single expert of weight 1 is not changed.

    Args:
        experts: Folders or files of LoRAs, each as PATH or NAME=PATH; diffusers', PEFT's or kohya's layout.
        out: Folder of the merged adapter; an earlier merge in it is replaced.
        pipeline: Folder or hub id of the base model, for regmean, comerge and fuse, and to check the experts' layers if
            it is on this machine; null takes the one that the experts' model cards or PEFT configurations name.
        weights: A weight for each expert, in the given order; null gives all the weight 1. Not for comerge.
        calibration: regmean, comerge and null_space: the prompts, and how the base model is measured on them.
        mus: regmean: also write an adapter for each of these mu, in folders such as mu-0.1, from the same measurement.
        tune: regmean: choose mu on validation prompts, among those of `tuning`; writes tuning.png, the curve of safety
            against fidelity, and adds all tried values to report.json.
        tuning: How mu is chosen.
        fuse: Also write the whole pipeline with the merged adapter in its weights, in fp32.
        device: Device for measuring the base model and choosing mu, such as cpu or cuda:1; null takes cuda if there is
            one.
        keep_statistics: regmean: keep the statistics in the folder statistics/ of `out`, so that experts can be added
            later. It is as large as the Gram matrices: some MB for the toy world, 1.3 GB for each expert for Stable
            Diffusion 1.5.
        add_to: regmean: folder of an earlier merge that kept its statistics. The given experts are added to those in
            it; the earlier experts' files are not needed and not measured again. The result is that of merging all at
            once, and also keeps statistics. `out` may be the same folder.
        **settings: How they are merged, see `Recipe`.

    Raises:
        UserError: an expert cannot be read or merged, they were made for different backbones, or an option is missing.
    """
    from lit_safety.adapters.lora import WEIGHTS_NAME
    from lit_safety.core.progress import quiet_libraries
    from lit_safety.merging.experts import read_experts, united_layers
    from lit_safety.merging.kept import keeping, read_kept
    from lit_safety.merging.merge_experts import report, table
    from lit_safety.merging.output import CURVE_NAME, REPORT_NAME, check_out, write_merge
    from lit_safety.merging.own_prompts import categories_of
    from lit_safety.merging.run import run

    quiet_libraries()
    if weights is not None and len(weights) != len(experts):
        raise UserError(f"--weights: {len(weights)} numbers for {len(experts)} experts; give one for each")
    kept = None if add_to is None else read_kept(Path(add_to))
    loaded = read_experts(experts, pipeline)
    earlier = [] if kept is None else [one.expert for one in kept.experts]
    every = [*earlier, *loaded]
    named = {one.expert.name: one.weight for one in (kept.experts if kept is not None else [])}
    named |= {expert.name: weight for expert, weight in zip(loaded, weights or [], strict=bool(weights))}
    recipe = Recipe(weights=named, **settings)
    if (asked := "--add_to" if kept else "--keep_statistics" if keep_statistics else None) and not recipe.own_inputs:
        raise UserError(f"{asked}: {recipe.method} keeps no statistics; use --method regmean, or merge all at once")
    if twice := sorted({one.name for one in earlier} & {one.name for one in loaded}):
        raise UserError(f"--add_to {add_to}: already holds an expert {twice[0]}; name the new one NAME=FOLDER")
    check_out(Path(out), [Path(str(expert.provenance["path"])) for expert in loaded])
    united_layers(every)
    base = pipeline or base_of(every)
    looks = recipe.looks(len(every)) or keep_statistics
    asks = [recipe.method if recipe.null_space is None else "--null_space"] if looks else []
    if (needs := [*asks, *(["--fuse"] if fuse else [])]) and base is None:
        raise UserError(f"{needs[0]} needs the base model, but no expert's card names one: give --pipeline")
    _check_mus(recipe, len(every), mus, tune, tuning, calibration)

    tried = tuning.mus if tune else [recipe.mu]
    with keeping(Path(out), keep_statistics or kept is not None, kept) as keeper:
        outcome = run(
            loaded,
            recipe,
            lambda: (_backbone(str(base), calibration, device), str(base)),
            calibration.prompts,
            calibration,
            sorted({*tried, *(mus or [])}) if recipe.own_inputs else (),
            keeper,
            kept,
        )
        mu, choice, curve = (recipe.mu, None, None)
        if tune:
            about = {*categories_of([one.name for one in loaded], calibration).values()}
            about |= {one.category for one in (kept.experts if kept is not None else []) if one.category}
            mu, choice, curve = _tuned(str(base), about, outcome, tuning, calibration, device)

        def told(mu: float) -> dict[str, Any]:
            return report(outcome.merged[mu], every, replace(recipe, mu=mu), outcome.measured, outcome.seconds)

        write_merge(
            Path(out),
            outcome.merged[mu],
            told(mu) | ({"tuning": choice} if choice is not None else {}),
            base,
            fuse,
            {f"mu-{one:g}": (outcome.merged[one], told(one)) for one in mus or []},
            curve,
            outcome.statistics,
        )
    print(f"{table(outcome.merged[mu])}\n\nadapter   {Path(out) / WEIGHTS_NAME}\nreport    {Path(out) / REPORT_NAME}")
    if tune:
        print(f"mu        {mu:g}, chosen on validation prompts: {Path(out) / CURVE_NAME}")
    if outcome.statistics is not None:
        print(f"kept      {Path(out) / outcome.statistics.name}")
    if fuse:
        print(f"pipeline  {Path(out) / 'pipeline'}")


def _check_mus(
    recipe: Recipe,
    experts: int,
    mus: list[float] | None,
    tune: bool,
    tuning: TuningOptions,
    calibration: CalibrationOptions,
) -> None:
    """Refuse wrong `mus` and `tune` before the model is loaded."""
    asked = [name for name, given in (("--mus", mus is not None), ("--tune", tune)) if given]
    if asked and not recipe.own_inputs:
        raise UserError(f"{asked[0]}: {recipe.method} has no mu; only regmean has")
    if asked and experts == 1:
        raise UserError(f"{asked[0]}: a single expert is not changed by a merge; give two or more")
    for mu in mus or []:
        replace(recipe, mu=mu)
    if tune:
        from lit_safety.merging.tune import check_tuning

        check_tuning(tuning, calibration.prompts)


def _tuned(
    base: str,
    categories: set[str],
    outcome: Outcome,
    tuning: TuningOptions,
    calibration: CalibrationOptions,
    device: str | None,
) -> tuple[float, dict[str, Any], bytes]:
    """The chosen mu, what the report says about the choice, and the curve."""
    from tempfile import TemporaryDirectory

    from lit_safety.adapters.lora import WEIGHTS_NAME
    from lit_safety.adapters.lora_file import write_lora
    from lit_safety.merging.tune import check_tuning, curve, table, told, tune

    begun = time.monotonic()
    prompts, _ = check_tuning(tuning, calibration.prompts)
    with TemporaryDirectory(prefix="lit-safety-mu-") as work:
        candidates = {mu: Path(work) / f"mu-{mu:g}" for mu in tuning.mus}
        for mu, folder in candidates.items():
            folder.mkdir(exist_ok=True)
            write_lora(folder / WEIGHTS_NAME, outcome.merged[mu].layers)
        report = Path(work) / "report"
        chosen, tried = tune(base, candidates, categories, tuning, calibration, outcome.used, report, device)
    print(f"{table(tried, chosen)}\n")
    outcome.seconds["tuning"] = time.monotonic() - begun
    return chosen.mu, told(chosen, tried, tuning, prompts), curve(tried, chosen)


def base_of(experts: Sequence[Expert]) -> str | None:
    """The base model that the experts' cards or configurations name; None: none is named.

    Raises:
        UserError: they name different base models.
    """
    named = {str(e.provenance["base_model"]): e.name for e in experts if e.provenance.get("base_model") is not None}
    if len(named) > 1:
        told = "; ".join(f"{expert}: {base}" for base, expert in named.items())
        raise UserError(
            f"the experts' cards or configurations name different base models ({told}); if these are several names of "
            "one model, give it as --pipeline"
        )
    return next(iter(named), None)


def _backbone(base: str, options: CalibrationOptions, device: str | None) -> Backbone:
    """The base model on the device where it is measured."""
    import torch

    from lit_safety.backbones.load import load_backbone
    from lit_safety.drawing.pipelines import local_pipeline
    from lit_safety.drawing.worlds import check_world

    asked = "--calibration.other_world true"
    check_world(local_pipeline(base), {"--calibration.prompts": options.prompts}, options.other_world, asked)
    backbone = load_backbone(base, key="--pipeline")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return backbone.to(where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {where}: {str(error).strip().splitlines()[0]}") from error
