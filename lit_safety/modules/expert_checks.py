"""What is refused where several experts are trained in one fit."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lit_safety.errors import UserError
from lit_safety.modules.phases import under_deepspeed
from lit_safety.objectives import Objective


def check_experts(trainer: Trainer, objective: Objective, names: Sequence[str], consecutive: bool) -> None:
    """Complain where the experts ``names`` would not be trained as they should; a single one may do anything.

    Raises:
        UserError: they would move while they idle, share what an objective learns, or be averaged with each other.
    """
    if len(names) == 1:
        return
    if under_deepspeed(trainer) and not consecutive:
        raise UserError(
            f"DPOExpert: interleaved training of {len(names)} experts is refused under DeepSpeed, which moves idle "
            "weights: set `data.init_args.consecutive: true`, or train with ddp"
        )
    if state := objective.state_dict():
        raise UserError(
            f"DPOExpert: {type(objective).__name__} learns while it trains ({', '.join(sorted(state))}), and "
            f"{len(names)} experts would share what it learns: take another objective, or train one category at a "
            "time and `merge` them"
        )
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UserError(
                f"{type(callback).__name__} would average {len(names)} experts with each other: leave it out, or "
                "train one category at a time"
            )
