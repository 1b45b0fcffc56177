"""The toy world: drawn scenes with known ground truth and a genuine Stable-Diffusion-shaped pipeline."""

from .captions import fold as fold
from .cost_model import write_cost_shards as write_cost_shards
from .seeds import SEEDS as SEEDS

__all__ = ["SEEDS", "fold", "write_cost_shards"]
