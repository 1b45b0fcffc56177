"""The LightningModules and the PreferenceModule they share."""

from lit_safety.modules.cost_model import CostModel
from lit_safety.modules.dpo_expert import DPOExpert
from lit_safety.modules.preference import PreferenceModule
from lit_safety.modules.psa import PSA
from lit_safety.modules.scdpo import SCDPO

__all__ = ["PSA", "SCDPO", "CostModel", "DPOExpert", "PreferenceModule"]
