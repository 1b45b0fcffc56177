"""The LightningModules and the PreferenceModule they share."""

from lit_safety.modules.preference import PreferenceModule
from lit_safety.modules.scdpo import SCDPO

__all__ = ["SCDPO", "PreferenceModule"]
