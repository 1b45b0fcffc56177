"""Checks of the pairs before a model is loaded: missing labels, and an anchor without effect."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lit_safety.core.errors import UserError
from lit_safety.data.protocols import LooksAhead
from lit_safety.modules.checks import needed_labels, way_out_of
from lit_safety.objectives.objective import Objective


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
