"""Attacks on aligned models: what it takes until they draw again what they were aligned not to draw.

One file an attack. YAML names them by class_path, so a new one is one subclass of `Attack` and a few lines of YAML.
"""

from lit_safety.attacks.adapter_scale import AdapterScale
from lit_safety.attacks.attack import Attack, Stage
from lit_safety.attacks.concept_direction import ConceptDirection
from lit_safety.attacks.fine_tune import FineTune
from lit_safety.attacks.paraphrases import Paraphrases
from lit_safety.attacks.prediction_match import PredictionMatch
from lit_safety.attacks.samplers import Sampler, Samplers
from lit_safety.attacks.soft_prompt import SoftPrompt
from lit_safety.attacks.style_lora import StyleLoRA
from lit_safety.attacks.suffix import SuffixSearch
from lit_safety.attacks.target import Target

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
