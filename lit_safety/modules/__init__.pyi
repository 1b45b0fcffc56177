"""The LightningModules and the PreferenceModule they share."""

from .anchors import PromptAnchors as PromptAnchors
from .cost_model import CostModel as CostModel
from .dpo_expert import DPOExpert as DPOExpert
from .preference import PreferenceModule as PreferenceModule
from .psa import PSA as PSA
from .scdpo import SCDPO as SCDPO
from .speed import SelectiveBackward as SelectiveBackward
from .stability import Stability as Stability

__all__ = [
    "PSA",
    "SCDPO",
    "CostModel",
    "DPOExpert",
    "PreferenceModule",
    "PromptAnchors",
    "SelectiveBackward",
    "Stability",
]
