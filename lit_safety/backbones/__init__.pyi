"""One class a model family: text in, latents in, noise, target, prediction. Nothing here knows of preferences."""

from .backbone import Backbone as Backbone
from .backbone import Conditioning as Conditioning
from .load import load_backbone as load_backbone

__all__ = ["Backbone", "Conditioning", "load_backbone"]
