"""lit_safety: make text-to-image models safe by preference optimisation, on Lightning."""

__version__ = "0.1.0"
