"""The toy world: drawn scenes with known ground truth and a genuine Stable-Diffusion-shaped pipeline."""
