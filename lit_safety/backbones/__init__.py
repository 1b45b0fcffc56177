"""One class a model family: text in, latents in, noise, target, prediction. Nothing here knows of preferences."""

from lit_safety.backbones.backbone import Backbone, Conditioning
from lit_safety.backbones.load import load_backbone

__all__ = ["Backbone", "Conditioning", "load_backbone"]
