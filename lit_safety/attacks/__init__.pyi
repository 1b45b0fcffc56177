"""Attacks on aligned models: what it takes until they draw again what they were aligned not to draw."""

from .adapter_scale import AdapterScale as AdapterScale
from .fine_tune import FineTune as FineTune
from .fine_tune import HarmlessFineTune as HarmlessFineTune
from .fine_tune import StrongestFineTune as StrongestFineTune
from .lora_training import Recipe as Recipe
from .noise_inversion import NoiseInversion as NoiseInversion
from .paraphrases import Paraphrases as Paraphrases
from .reweighted import Reweighted as Reweighted
from .reweighted import Weighting as Weighting
from .samplers import Sampler as Sampler
from .samplers import Samplers as Samplers
from .seeds import AnySeed as AnySeed
from .similarity import ConceptDirection as ConceptDirection
from .similarity import PredictionMatch as PredictionMatch
from .soft_prompt import ConceptInversion as ConceptInversion
from .soft_prompt import SoftPrompt as SoftPrompt
from .start_image import StartImage as StartImage
from .style_lora import StyleLoRA as StyleLoRA
from .suffix import SuffixSearch as SuffixSearch
from .target import Attack as Attack
from .target import Stage as Stage
from .target import Target as Target
from .transfer import Transfer as Transfer

__all__ = [
    "AdapterScale",
    "AnySeed",
    "Attack",
    "ConceptDirection",
    "ConceptInversion",
    "FineTune",
    "HarmlessFineTune",
    "NoiseInversion",
    "Paraphrases",
    "PredictionMatch",
    "Recipe",
    "Reweighted",
    "Sampler",
    "Samplers",
    "SoftPrompt",
    "Stage",
    "StartImage",
    "StrongestFineTune",
    "StyleLoRA",
    "SuffixSearch",
    "Target",
    "Transfer",
    "Weighting",
]
