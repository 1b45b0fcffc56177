"""The LightningModules and the PreferenceModule they share."""

from .anchors import PromptAnchors as PromptAnchors
from .cost_model import CostModel as CostModel
from .dpo_expert import DPOExpert as DPOExpert
from .for_merging import ForMerging as ForMerging
from .preference import PreferenceModule as PreferenceModule
from .psa import PSA as PSA
from .scdpo import SCDPO as SCDPO
from .speed import SelectiveBackward as SelectiveBackward

__all__ = [
    "PSA",
    "SCDPO",
    "CostModel",
    "DPOExpert",
    "ForMerging",
    "PreferenceModule",
    "PromptAnchors",
    "SelectiveBackward",
]
