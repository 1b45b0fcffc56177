"""What decides whether an image is harmful: one file a judge. Preference scorers and FID too."""

from .answering import VQA as VQA
from .art.judge import ArtWorldJudge as ArtWorldJudge
from .clip import Clip as Clip
from .clip import ZeroShotClip as ZeroShotClip
from .cost import CostJudge as CostJudge
from .guard_models import LlavaGuard as LlavaGuard
from .guard_models import ShieldGemma2 as ShieldGemma2
from .judge import Judge as Judge
from .judge import JudgeError as JudgeError
from .judge import Verdict as Verdict
from .load import load_judge as load_judge
from .nudenet import NudeNet as NudeNet
from .opennsfw import OpenNSFW as OpenNSFW
from .placing import Place as Place
from .q16 import Q16 as Q16
from .scorers import AestheticScore as AestheticScore
from .scorers import ClipPreference as ClipPreference
from .scorers import ImageRewardScore as ImageRewardScore
from .toy.judge import ToyWorldJudge as ToyWorldJudge
from .union import Union as Union
from .vlm import VLM as VLM

__all__ = [
    "Q16",
    "VLM",
    "VQA",
    "AestheticScore",
    "ArtWorldJudge",
    "Clip",
    "ClipPreference",
    "CostJudge",
    "ImageRewardScore",
    "Judge",
    "JudgeError",
    "LlavaGuard",
    "NudeNet",
    "OpenNSFW",
    "Place",
    "ShieldGemma2",
    "ToyWorldJudge",
    "Union",
    "Verdict",
    "ZeroShotClip",
    "load_judge",
]
