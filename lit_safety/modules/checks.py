"""Checks of caches, orders, labels and callbacks: before weights are loaded, and on every batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_safety.core.errors import UserError
from lit_safety.data.protocols import LooksAhead, PairData, shards_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.objectives.objective import Objective

if TYPE_CHECKING:
    from lit_safety.backbones.settings import BackboneSettings
    from lit_safety.data.cache.sources import CachedSource

# Caches: were they made by the model that is trained, and do they hold what it needs?


def check_caches(datamodule: object, pretrained: str, stage: str) -> None:
    """Compare the caches that ``datamodule`` reads in ``stage`` with the encoders of ``pretrained``.

    Encoders without files on disk cannot be compared: a run from a cache does not need them, and the log says so.

    Raises:
        UserError: a cache was made by another model; the message names both.
    """
    if not (found := _caches(datamodule, stage)):
        return
    from lit_safety.backbones.load import family_of
    from lit_safety.data.cache.cache import check_model

    weights = family_of(pretrained).encoder_hashes(pretrained)
    for one in found:
        if unknown := check_model(one.cache, pretrained, weights, one.key):
            rank_zero_info(
                f"{one.key}: {', '.join(unknown)} of {pretrained} was not found, so it is not compared with the "
                f"cache's, which {one.cache.model} made"
            )


def _changed(settings: BackboneSettings, default: BackboneSettings) -> list[str]:
    """The settings that change errors and differ from the family's defaults."""
    usual = vars(default)
    return [
        name
        for name, value in vars(settings).items()
        if not name.endswith("_dtype") and value != usual.get(name, value)
    ]


def check_references(
    datamodule: object,
    pretrained: str,
    stage: str,
    objective: Objective,
    drops: bool,
    settings: BackboneSettings | None = None,
) -> None:
    """Check that reference caches are of ``pretrained``'s denoiser and hold what is needed; sets what is read of them.

    Args:
        datamodule: any; a user's own datamodule has no caches to check.
        pretrained: the model that is trained.
        stage: `fit`, `validate`, `test` or `predict`.
        objective: the objective of the run.
        drops: whether prompts are dropped in training.
        settings: the run's settings of the model's family; caches are made with the family's defaults.

    Raises:
        UserError: a cache does not fit; the message names it and what it lacks.
    """
    from lit_safety.backbones.load import family_of

    for one in _caches(datamodule, stage):
        if (reference := one.cache.reference) is None:
            continue
        from lit_safety.backbones.fingerprint import reference_hashes

        if settings is not None and (changed := _changed(settings, family_of(pretrained).SETTINGS())):
            raise UserError(
                f"{one.key}: a reference cache is made with the family's defaults, but `model.init_args.backbone` sets "
                f"{', '.join(changed)}: set data.init_args.use_reference to false"
            )
        own = reference_hashes(pretrained, family_of(pretrained).DENOISER)
        for name in {**reference.weights, **own}:
            if own.get(name) != (made := reference.weights.get(name)):
                raise UserError(
                    f"{one.key}: the reference cache was made by {one.cache.model} ({name} {_short(made)}), but this "
                    f"run's model is {pretrained} ({name} {_short(own.get(name))}); make it again with `shards "
                    f"precompute --model {pretrained}`, or set data.init_args.use_reference to false"
                )
        kind = type(objective).__name__
        if objective.reads_drift:
            raise UserError(
                f"{one.key}: {kind} reads the reference's predictions of every pair, but a reference cache holds only "
                "those of clean prompts: set data.init_args.use_reference to false"
            )
        if objective.needs_drift and not reference.predictions:
            what = "anchor_weight" if objective.anchor_weight > 0 else "what it computes"
            raise UserError(
                f"{one.key}: {kind} needs the reference's predictions for {what}, but the reference cache holds only "
                "its errors: make it again with `shards precompute --reference_predictions true`, set "
                "objective.init_args.anchor_weight to 0, or data.init_args.use_reference to false"
            )
        if drops and stage == "fit" and not reference.empty:
            raise UserError(
                f"{one.key}: prompts are dropped in training, but the reference cache holds no errors without the "
                "prompt: make it again with `shards precompute --reference_dropout true`, or set every dropout of a "
                "prompt to 0"
            )
        if isinstance(datamodule, PairData):
            datamodule.read_predictions(objective.needs_drift)


def _short(found: str | None) -> str:
    return "not found" if found is None else found[:8]


def reference_cached(datamodule: object, stage: str) -> bool:
    """Whether all pairs of ``stage`` come with the reference's errors, so that the reference never runs."""
    found = _caches(datamodule, stage)
    if not found or any(one.cache.reference is None for one in found):
        return False
    needed = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
    return len(found) == len(shards_of(datamodule).keys() & set(needed))


def _caches(datamodule: object, stage: str) -> list[CachedSource]:
    return datamodule.caches(stage) if isinstance(datamodule, PairData) else []


# Labels: do pairs carry what the objective reads? The manifests say so before a start, a batch's lists in a step.
#
# These lists are on the host, so that no check waits for the device.


def check_orders(objective: Objective, datamodule: object, stage: str) -> None:
    """Refuse pairs whose order already contains what the objective adds, as far as the manifests say it.

    Args:
        objective: what is computed on the pairs.
        datamodule: any; with a user's own datamodule, each batch is checked when it comes (`check_labels`).
        stage: `fit`, `validate`, `test` or `predict`.

    Raises:
        UserError: the message names the folder, the number of such pairs, and what can be done.
    """
    if not isinstance(datamodule, PairData) or stage == "predict" or not objective.refuses_composite:
        return
    for where, counts in datamodule.orders(stage).items():
        if counts["composite"]:
            name = type(objective).__name__
            raise UserError(
                f"{where}: {counts['composite']} of {counts.total()} pairs are ordered by quality minus cost (order: "
                f"composite); {name} would count the cost twice: {way_out_of(objective)}, or leave these pairs out "
                "with `data.init_args.orders: [safety, quality]`"
            )


def way_out_of(objective: Objective) -> str:
    if objective.opt_out is None:
        return "choose another objective"
    return f"set `model.init_args.objective.init_args.{objective.opt_out}`"


def needed_labels(objective: Objective, may_fill: bool) -> list[tuple[str, str]]:
    """The labels that the objective reads, each with advice on how pairs without it can get it."""
    score_first = "score the shards with a cost model first (`shards score`)"
    if may_fill:
        score_first += (
            ", or name one in `model.init_args.cost_model`, or take 1 for a harmful and -1 for a safe image with "
            "`model.init_args.label_costs: true`"
        )
    needed = [
        (objective.needs_cost, "cost", score_first),
        (objective.needs_score, "score", "write the quality of both images into the shards first"),
        (objective.needs_harmful, "harmful label", "label both images first"),
    ]
    return [(label, cure) for needs, label, cure in needed if needs]


def check_labels(objective: Objective, batch: PairBatch, cost_model: bool = False) -> None:
    """Refuse pairs that lack a label the objective needs, or whose order already contains what it adds.

    Unknown never counts as harmless: a missing label stops the run. If the objective has a setting that makes the label
    unnecessary (`Objective.opt_out`), the message names it.

    Args:
        objective: what is computed on the pairs.
        batch: the pairs.
        cost_model: whether the module has the option `cost_model`, which the message then names.

    Raises:
        UserError: the message names the sample, what is missing, and what can be done.
    """
    name = type(objective).__name__
    way_out = way_out_of(objective)
    known = {"cost": batch.has_cost, "score": batch.has_score, "harmful label": batch.has_harmful}
    for label, cure in needed_labels(objective, cost_model):
        for key, has_label in zip(batch.keys, known[label], strict=True):
            if not has_label:
                raise UserError(f"sample {key} has no {label}, and {name} needs both images': {cure}, or {way_out}")
    if objective.refuses_composite:
        for key, order in zip(batch.keys, batch.orders, strict=True):
            if order == "composite":
                raise UserError(
                    f"sample {key} is ordered by quality minus cost (order: composite); {name} would count the cost "
                    f"twice: {way_out}"
                )


def check_first_pairs(objective: Objective, datamodule: object, stage: str, fills_costs: bool | None) -> None:
    """Before weights are loaded, refuse pairs without a label that the objective needs.

    The manifests do not count costs and scores, so only the first pair of each folder is read. `check_labels` finds
    later pairs during training.

    Args:
        objective: what is computed on the pairs.
        datamodule: any; a user's own datamodule is asked if it supports it (`LooksAhead`).
        stage: `fit`, `validate`, `test` or `predict`.
        fills_costs: whether the module gives costs to pairs without costs; None: it has no option for it.

    Raises:
        UserError: the message names the key, the folder, the pair, what is missing and what can be done.
    """
    needs = objective.needs_cost or objective.needs_score or objective.needs_harmful
    if not isinstance(datamodule, LooksAhead) or stage == "predict" or not needs:
        return
    for where, (pair, about) in datamodule.first_pairs(stage).items():
        known = {
            "cost": about.knows("cost", objective.needs_groups) or bool(fills_costs),
            "score": about.knows("score", objective.needs_groups),
            "harmful label": about.knows("harmful", objective.needs_groups),
        }
        for label, cure in needed_labels(objective, fills_costs is not None):
            if not known[label]:
                raise UserError(
                    f"{where}: the first pair, {pair}, has no {label}, but {type(objective).__name__} needs both "
                    f"images': {cure}, or {way_out_of(objective)}"
                )


def say_idle_anchor(objective: Objective, datamodule: object) -> None:
    """Say that an anchor has no effect: it acts on pairs with a clean prompt, and the training pairs have none.

    It is not an error: the same config is used for shards with and without clean pairs.
    """
    if objective.anchor_weight == 0 or not isinstance(datamodule, LooksAhead):
        return
    kinds = datamodule.kinds("train")
    if kinds and not kinds["clean"]:
        rank_zero_warn(
            f"`model.init_args.objective.init_args.anchor_weight: {objective.anchor_weight:g}` has no effect: it acts "
            f"on pairs with a clean prompt, but all {kinds.total()} training pairs have harmful prompts (add pairs "
            "with `prompt_kind: clean` to `data.init_args.train`, or set it to 0, which saves a reference pass)"
        )


# Callbacks: if the objective has a state that its loss does not learn, does a callback update it?


@runtime_checkable
class MovesObjective(Protocol):
    """A callback that updates an objective's state outside of its loss; a class attribute says which objective."""

    moves: ClassVar[type[Objective]]


def warn_if_not_moved(objective: Objective, callbacks: Iterable[object]) -> None:
    """Warn if an objective's state must be updated by a callback and none of ``callbacks`` declares that it does.

    It is not an error: the objective with a constant state is a useful ablation.
    """
    callback = objective.moved_by
    if callback is None:
        return
    if any(isinstance(one, MovesObjective) and isinstance(objective, one.moves) for one in callbacks):
        return
    state = ", ".join(f"`{name}`" for name in objective.state_dict())
    rank_zero_warn(
        f"{type(objective).__name__} is trained, but nothing updates {state}: it keeps its first value, whatever the "
        f"policy draws, because `trainer.callbacks` does not list {callback}; unless you want it constant, add "
        f"`--trainer.callbacks+=lit_safety.callbacks.{callback}` with `--trainer.callbacks.cost_model FOLDER`"
    )
