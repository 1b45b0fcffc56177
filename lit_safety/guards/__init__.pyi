"""The guards by name, as YAML writes them."""

from lit_safety.drawing.guards import SAFREE as SAFREE
from lit_safety.drawing.guards import Guard as Guard
from lit_safety.drawing.guards import RoutedExperts as RoutedExperts
from lit_safety.drawing.guards import SafeLatentDiffusion as SafeLatentDiffusion

__all__ = ["SAFREE", "Guard", "RoutedExperts", "SafeLatentDiffusion"]
