"""Whether the pairs of a batch carry what an objective reads, from host lists: nothing waits for the device."""

from __future__ import annotations

from lit_safety.data.batch import PairBatch
from lit_safety.errors import UserError
from lit_safety.objectives import Objective


def check_labels(objective: Objective, batch: PairBatch) -> None:
    """Refuse pairs that lack a label the objective needs, or whose order already holds what it adds.

    Unknown is never read as harmless: a label that is not there stops the run, unless the objective has a setting that
    does without it (`Objective.opt_out`), which the message names.

    Raises:
        UserError: naming the sample, what is missing, and the way out.
    """
    name = type(objective).__name__
    way_out = "choose another objective"
    if objective.opt_out is not None:
        way_out = f"set `model.init_args.objective.init_args.{objective.opt_out}`"
    needed = [
        (objective.needs_cost, batch.has_cost, "cost", "score the shards with a cost model first"),
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
