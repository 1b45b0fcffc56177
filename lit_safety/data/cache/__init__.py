"""Latents, text and reference errors that are computed once, and read instead of images."""
