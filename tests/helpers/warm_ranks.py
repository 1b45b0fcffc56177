"""All that a rank of a fit imports; a fork server loads it once and every rank starts with it."""

import deepspeed  # noqa: F401
import diffusers
import torch.utils.tensorboard  # noqa: F401
import transformers

import lit_safety.callbacks
import lit_safety.cli.trainer
import lit_safety.data
import lit_safety.modules  # noqa: F401

# Both load their parts when they are first asked for.
PIPELINE = (diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)
TEXT = (transformers.CLIPTextModel, transformers.CLIPTokenizer, diffusers.DDIMScheduler, diffusers.DDPMScheduler)
