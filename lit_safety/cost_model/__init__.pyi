"""The safety cost model's parts: frozen CLIP tower, adapter, losses, calibration, files."""

from .degrade import Degradation as Degradation
from .ensemble import CostEnsemble as CostEnsemble
from .ensemble import load_ensemble as load_ensemble
from .files import load_cost_model as load_cost_model
from .files import save_cost_model as save_cost_model
from .fill import fill_costs as fill_costs
from .losses import CostLoss as CostLoss
from .losses import InfoNCECostLoss as InfoNCECostLoss
from .losses import PairwiseCostLoss as PairwiseCostLoss
from .network import ClipTower as ClipTower
from .network import CostScorer as CostScorer

__all__ = [
    "ClipTower",
    "CostEnsemble",
    "CostLoss",
    "CostScorer",
    "Degradation",
    "InfoNCECostLoss",
    "PairwiseCostLoss",
    "fill_costs",
    "load_cost_model",
    "load_ensemble",
    "save_cost_model",
]
