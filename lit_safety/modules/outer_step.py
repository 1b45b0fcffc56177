"""At the start of a fit: does anything move what the objective learns outside of its loss?"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_safety.objectives import Objective


def warn_without_outer_step(objective: Objective, trainer: Trainer) -> None:
    """Warn where an objective has an outer step and ``trainer`` lacks the callback that takes it.

    A warning and no error: the objective with a constant state is a legitimate ablation. The callback is known by its
    class's name, its subclasses too, because callbacks import modules.
    """
    callback = objective.moved_by
    if callback is None or any(
        kind.__name__ == callback for one in getattr(trainer, "callbacks", []) for kind in type(one).__mro__
    ):
        return
    state = ", ".join(f"`{name}`" for name in objective.state_dict())
    rank_zero_warn(
        f"{type(objective).__name__} is trained without its outer step: {state} stays what it is at the start, "
        f"whatever the policy draws, because `trainer.callbacks` has no {callback}; unless you want it constant, add "
        f"`--trainer.callbacks+=lit_safety.callbacks.{callback}` with `--trainer.callbacks.cost_model FOLDER`"
    )
