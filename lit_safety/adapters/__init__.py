"""What is added to a frozen denoiser: LoRA policies and experts, their files in and out."""

from lit_safety.adapters.lora import LoRA, load_lora

__all__ = ["LoRA", "load_lora"]
