"""The LightningModules and the PreferenceModule they share."""

from .adversaries import HiddenAdversary as HiddenAdversary
from .adversaries import TextAdversary as TextAdversary
from .anchors import PromptAnchors as PromptAnchors
from .cost_model import CostModel as CostModel
from .dpo_expert import DPOExpert as DPOExpert
from .for_merging import ForMerging as ForMerging
from .online import OnlineSCDPO as OnlineSCDPO
from .preference import PreferenceModule as PreferenceModule
from .psa import PSA as PSA
from .retain import ProjectRetain as ProjectRetain
from .rounds import Explore as Explore
from .scdpo import SCDPO as SCDPO
from .speed import SelectiveBackward as SelectiveBackward
from .stability import Stability as Stability
from .step_parts import Adversary as Adversary

__all__ = [
    "PSA",
    "SCDPO",
    "Adversary",
    "CostModel",
    "DPOExpert",
    "Explore",
    "ForMerging",
    "HiddenAdversary",
    "OnlineSCDPO",
    "PreferenceModule",
    "ProjectRetain",
    "PromptAnchors",
    "SelectiveBackward",
    "Stability",
    "TextAdversary",
]
