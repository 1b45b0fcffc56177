"""Whether pairs carry what an objective reads: from the manifests before a start, from a batch's host lists in a step.

Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

from lit_safety.data.batch import PairBatch
from lit_safety.errors import UserError
from lit_safety.objectives import Objective


def check_orders(objective: Objective, datamodule: Any, stage: str) -> None:
    """Refuse pairs whose order already holds what the objective adds, as far as the manifests tell of them.

    Args:
        objective: what is computed on the pairs.
        datamodule: any; of one of somebody's own, each batch is looked at in its turn (`check_labels`).
        stage: `fit`, `validate`, `test` or `predict`.

    Raises:
        UserError: naming the folder, the number of such pairs, and the ways out.
    """
    orders = getattr(datamodule, "orders", None)
    if orders is None or stage == "predict" or not objective.refuses_composite:
        return
    for where, counts in orders(stage).items():
        if counts["composite"]:
            name = type(objective).__name__
            raise UserError(
                f"{where}: {counts['composite']} of {counts.total()} pairs are ordered by quality minus cost (order: "
                f"composite); {name} would count the cost twice: {_way_out(objective)}, or leave these pairs out with "
                "`data.init_args.orders: [safety, quality]`"
            )


def _way_out(objective: Objective) -> str:
    if objective.opt_out is None:
        return "choose another objective"
    return f"set `model.init_args.objective.init_args.{objective.opt_out}`"


def check_labels(objective: Objective, batch: PairBatch, cost_model: bool = False) -> None:
    """Refuse pairs that lack a label the objective needs, or whose order already holds what it adds.

    Unknown is never read as harmless: a label that is not there stops the run, unless the objective has a setting that
    does without it (`Objective.opt_out`), which the message names.

    Args:
        objective: what is computed on the pairs.
        batch: the pairs.
        cost_model: whether the module has the option `cost_model`, so that the message can name it.

    Raises:
        UserError: naming the sample, what is missing, and the way out.
    """
    name = type(objective).__name__
    way_out = _way_out(objective)
    score_first = "score the shards with a cost model first"
    if cost_model:
        score_first += ", or name one in `model.init_args.cost_model`"
    needed = [
        (objective.needs_cost, batch.has_cost, "cost", score_first),
        (objective.needs_score, batch.has_score, "score", "write the quality of both images into the shards first"),
        (objective.needs_harmful, batch.has_harmful, "harmful label", "label both images first"),
    ]
    for needs, known, label, cure in needed:
        for key, has_label in zip(batch.keys, known, strict=True):
            if needs and not has_label:
                raise UserError(f"sample {key} has no {label}, and {name} needs both images': {cure}, or {way_out}")
    if objective.refuses_composite:
        for key, order in zip(batch.keys, batch.orders, strict=True):
            if order == "composite":
                raise UserError(
                    f"sample {key} is ordered by quality minus cost (order: composite); {name} would count the cost "
                    f"twice: {way_out}"
                )
