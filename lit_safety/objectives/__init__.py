"""Formulas: pure functions of errors, costs and labels. This package imports torch and nothing of ours."""

from lit_safety.objectives.bfpo import BFPO, bfpo_loss, bfpo_target
from lit_safety.objectives.constrained import ConstrainedDPO, dual_update, reorder, reward_order
from lit_safety.objectives.diffusion_dpo import DiffusionDPO, dpo_loss
from lit_safety.objectives.focal_inverse import FocalInverse, focal_inverse_loss
from lit_safety.objectives.hinge import Hinge, hinge_loss
from lit_safety.objectives.ipo import IPO, ipo_loss
from lit_safety.objectives.objective import Objective, ObjectiveOutput
from lit_safety.objectives.pair import PairErrors, PairLabels, delta, margin, prediction_error, residual_overlap
from lit_safety.objectives.regularizers import anchor_loss, sft_loss
from lit_safety.objectives.repo import RePO, repo_penalty
from lit_safety.objectives.safety_constrained import SafetyConstrainedDPO, cost_margin, scdpo_loss
from lit_safety.objectives.sdpo import DiffusionSDPO, loser_scale, scale_gradient

__all__ = [
    "BFPO",
    "IPO",
    "ConstrainedDPO",
    "DiffusionDPO",
    "DiffusionSDPO",
    "FocalInverse",
    "Hinge",
    "Objective",
    "ObjectiveOutput",
    "PairErrors",
    "PairLabels",
    "RePO",
    "SafetyConstrainedDPO",
    "anchor_loss",
    "bfpo_loss",
    "bfpo_target",
    "cost_margin",
    "delta",
    "dpo_loss",
    "dual_update",
    "focal_inverse_loss",
    "hinge_loss",
    "ipo_loss",
    "loser_scale",
    "margin",
    "prediction_error",
    "reorder",
    "repo_penalty",
    "residual_overlap",
    "reward_order",
    "scale_gradient",
    "scdpo_loss",
    "sft_loss",
]
