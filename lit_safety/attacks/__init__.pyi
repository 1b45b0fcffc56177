"""Attacks on aligned models: what it takes until they draw again what they were aligned not to draw."""

from .adapter_scale import AdapterScale as AdapterScale
from .fine_tune import FineTune as FineTune
from .paraphrases import Paraphrases as Paraphrases
from .samplers import Sampler as Sampler
from .samplers import Samplers as Samplers
from .similarity import ConceptDirection as ConceptDirection
from .similarity import PredictionMatch as PredictionMatch
from .soft_prompt import SoftPrompt as SoftPrompt
from .style_lora import StyleLoRA as StyleLoRA
from .suffix import SuffixSearch as SuffixSearch
from .target import Attack as Attack
from .target import Stage as Stage
from .target import Target as Target

__all__ = [
    "AdapterScale",
    "Attack",
    "ConceptDirection",
    "FineTune",
    "Paraphrases",
    "PredictionMatch",
    "Sampler",
    "Samplers",
    "SoftPrompt",
    "Stage",
    "StyleLoRA",
    "SuffixSearch",
    "Target",
]
