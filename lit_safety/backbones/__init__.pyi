"""One class a model family: text in, latents in, noise, target, prediction. Nothing here knows of preferences."""

from .backbone import Backbone as Backbone
from .backbone import Conditioning as Conditioning
from .load import load_backbone as load_backbone
from .settings import BackboneSettings as BackboneSettings
from .settings import FlowSettings as FlowSettings
from .settings import GuidedFlowSettings as GuidedFlowSettings

__all__ = ["Backbone", "BackboneSettings", "Conditioning", "FlowSettings", "GuidedFlowSettings", "load_backbone"]
