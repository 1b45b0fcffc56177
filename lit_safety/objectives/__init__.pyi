"""Formulas: pure functions of errors, costs and labels. This package imports torch and nothing of ours."""

from .bfpo import BFPO as BFPO
from .bfpo import bfpo_loss as bfpo_loss
from .bfpo import bfpo_target as bfpo_target
from .constrained import ConstrainedDPO as ConstrainedDPO
from .constrained import barrier as barrier
from .constrained import barrier_slope as barrier_slope
from .constrained import dual_update as dual_update
from .constrained import rectified_excess as rectified_excess
from .constrained import reorder as reorder
from .constrained import reward_order as reward_order
from .dmpo import DMPO as DMPO
from .dmpo import dmpo_loss as dmpo_loss
from .dpo import IPO as IPO
from .dpo import DiffusionDPO as DiffusionDPO
from .dpo import FocalInverse as FocalInverse
from .dpo import Hinge as Hinge
from .dpo import LinearDPO as LinearDPO
from .dpo import dpo_loss as dpo_loss
from .dpo import focal_inverse_loss as focal_inverse_loss
from .dpo import hinge_loss as hinge_loss
from .dpo import ipo_loss as ipo_loss
from .dpo import linear_loss as linear_loss
from .dspo import DSPO as DSPO
from .dspo import dspo_loss as dspo_loss
from .groups import GDRO as GDRO
from .groups import NCD as NCD
from .groups import GroupDPO as GroupDPO
from .groups import gdro_loss as gdro_loss
from .groups import group_dpo_loss as group_dpo_loss
from .groups import ncd_mod as ncd_mod
from .groups import ncd_pair as ncd_pair
from .groups import ncd_weights as ncd_weights
from .nft import DiffusionNFT as DiffusionNFT
from .nft import lagrangian as lagrangian
from .nft import nft_errors as nft_errors
from .nft import nft_loss as nft_loss
from .nft import normalised_rewards as normalised_rewards
from .nft import relative as relative
from .objective import GroupErrors as GroupErrors
from .objective import GroupLabels as GroupLabels
from .objective import Objective as Objective
from .objective import ObjectiveOutput as ObjectiveOutput
from .objective import PairErrors as PairErrors
from .objective import PairLabels as PairLabels
from .objective import anchor_loss as anchor_loss
from .objective import delta as delta
from .objective import margin as margin
from .objective import prediction_error as prediction_error
from .objective import residual_overlap as residual_overlap
from .objective import sft_loss as sft_loss
from .repo import RePO as RePO
from .repo import repo_penalty as repo_penalty
from .safety_constrained import SafetyConstrainedDPO as SafetyConstrainedDPO
from .safety_constrained import cost_margin as cost_margin
from .safety_constrained import scdpo_loss as scdpo_loss
from .sdpo import DiffusionSDPO as DiffusionSDPO
from .sdpo import loser_scale as loser_scale
from .sdpo import scale_gradient as scale_gradient

__all__ = [
    "BFPO",
    "DMPO",
    "DSPO",
    "GDRO",
    "IPO",
    "NCD",
    "ConstrainedDPO",
    "DiffusionDPO",
    "DiffusionNFT",
    "DiffusionSDPO",
    "FocalInverse",
    "GroupDPO",
    "GroupErrors",
    "GroupLabels",
    "Hinge",
    "LinearDPO",
    "Objective",
    "ObjectiveOutput",
    "PairErrors",
    "PairLabels",
    "RePO",
    "SafetyConstrainedDPO",
    "anchor_loss",
    "barrier",
    "barrier_slope",
    "bfpo_loss",
    "bfpo_target",
    "cost_margin",
    "delta",
    "dmpo_loss",
    "dpo_loss",
    "dspo_loss",
    "dual_update",
    "focal_inverse_loss",
    "gdro_loss",
    "group_dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "lagrangian",
    "linear_loss",
    "loser_scale",
    "margin",
    "ncd_mod",
    "ncd_pair",
    "ncd_weights",
    "nft_errors",
    "nft_loss",
    "normalised_rewards",
    "prediction_error",
    "rectified_excess",
    "relative",
    "reorder",
    "repo_penalty",
    "residual_overlap",
    "reward_order",
    "scale_gradient",
    "scdpo_loss",
    "sft_loss",
]
