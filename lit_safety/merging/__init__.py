"""Merging LoRA experts: always the updates themselves (delta space), never their factors A and B apart."""
