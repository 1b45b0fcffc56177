"""Guards that need no training: what is done to a pipeline while it draws."""

from .safe_latent_diffusion import SafeLatentDiffusion as SafeLatentDiffusion
from .safree import SAFREE as SAFREE

__all__ = ["SAFREE", "SafeLatentDiffusion"]
