"""Guards that need no training: what is done to a pipeline while it draws."""

from .guard import Guard as Guard
from .routed_experts import RoutedExperts as RoutedExperts
from .safe_latent_diffusion import SafeLatentDiffusion as SafeLatentDiffusion
from .safree import SAFREE as SAFREE

__all__ = ["SAFREE", "Guard", "RoutedExperts", "SafeLatentDiffusion"]
