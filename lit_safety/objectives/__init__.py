"""Formulas: pure functions of errors, costs and labels. This package imports torch and nothing of ours."""

from lit_safety.objectives.diffusion_dpo import DiffusionDPO, dpo_loss
from lit_safety.objectives.objective import Objective, ObjectiveOutput
from lit_safety.objectives.pair import PairErrors, PairLabels, delta, margin, prediction_error
from lit_safety.objectives.regularizers import anchor_loss, sft_loss
from lit_safety.objectives.safety_constrained import SafetyConstrainedDPO, cost_margin, scdpo_loss

__all__ = [
    "DiffusionDPO",
    "Objective",
    "ObjectiveOutput",
    "PairErrors",
    "PairLabels",
    "SafetyConstrainedDPO",
    "anchor_loss",
    "cost_margin",
    "delta",
    "dpo_loss",
    "margin",
    "prediction_error",
    "scdpo_loss",
    "sft_loss",
]
