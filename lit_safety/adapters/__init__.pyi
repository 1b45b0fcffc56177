"""What is added to a frozen denoiser: LoRA policies and experts, user attention, and their files."""

from .load_lora import load_lora as load_lora
from .lora import LoRA as LoRA
from .user_pipeline import load_psa as load_psa
from .user_pipeline import unload_psa as unload_psa

__all__ = ["LoRA", "load_lora", "load_psa", "unload_psa"]
