"""The embedded worlds: drawn scenes with known ground truth, and pipelines trained on them."""
