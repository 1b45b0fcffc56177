"""The safety cost model's parts: frozen CLIP tower, adapter, losses, calibration, files. The LightningModule is
`lit_safety.modules.CostModel`.

The names below are imported when they are first used: losses and figures need no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_safety.cost_model.degrade import Degradation
    from lit_safety.cost_model.files import load_cost_model, save_cost_model
    from lit_safety.cost_model.fill import fill_costs
    from lit_safety.cost_model.objective import CostLoss, InfoNCECostLoss, PairwiseCostLoss
    from lit_safety.cost_model.scorer import CostScorer

_HOMES = {
    "CostLoss": "objective",
    "CostScorer": "scorer",
    "Degradation": "degrade",
    "InfoNCECostLoss": "objective",
    "PairwiseCostLoss": "objective",
    "fill_costs": "fill",
    "load_cost_model": "files",
    "save_cost_model": "files",
}

__all__ = [
    "CostLoss",
    "CostScorer",
    "Degradation",
    "InfoNCECostLoss",
    "PairwiseCostLoss",
    "fill_costs",
    "load_cost_model",
    "save_cost_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
