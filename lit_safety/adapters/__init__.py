"""What is added to a frozen denoiser: LoRA policies and experts, user attention, their files in and out."""

from lit_safety.adapters.load_lora import load_lora
from lit_safety.adapters.lora import LoRA
from lit_safety.adapters.psa_pipeline import load_psa, unload_psa

__all__ = ["LoRA", "load_lora", "load_psa", "unload_psa"]
