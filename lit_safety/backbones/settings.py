"""A run's settings of a backbone: one class for each kind of family. `model.init_args.backbone` gives its `class_path`.

A family says which of these classes it reads (`Backbone.SETTINGS`) and refuses those of another kind. This file imports
nothing heavy: command lines are parsed with it.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["BackboneSettings", "FlowSettings", "GuidedFlowSettings"]

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["torchao_8bit", "bitsandbytes_8bit", "bitsandbytes_4bit"]


class BackboneSettings:
    """Settings that every family has.

    Args:
        encoder_dtype: number format of the frozen text encoders. The image encoder stays in float32, because it is
            small and its rounding errors would be in every latent.
        denoiser_dtype: number format in which the denoiser's frozen weights are read and kept. Below float32 it always
            runs under autocast of this format; the LoRA stays in float32.
        denoiser_quantization: store the weights of the denoiser's frozen linear layers in fewer bits, as diffusers
            loads them: `torchao_8bit` (whole numbers with a scale for each row; on CPUs too), `bitsandbytes_8bit`
            (LLM.int8) or `bitsandbytes_4bit` (NF4; both on GPUs). The package must be installed. The aligned model is
            then this rounded one, but the LoRA is later used with the original model. `denoiser_dtype: bfloat16` is
            usually set too. It works only with one process or DDP. null: as `denoiser_dtype` says.
    """

    def __init__(
        self,
        encoder_dtype: Dtype = "float32",
        denoiser_dtype: Dtype = "float32",
        denoiser_quantization: Quantization | None = None,
    ) -> None:
        self.encoder_dtype = encoder_dtype
        self.denoiser_dtype = denoiser_dtype
        self.denoiser_quantization = denoiser_quantization


class FlowSettings(BackboneSettings):
    """Families trained by rectified flow: the distribution of their training noise levels.

    A draw u in (0, 1) becomes sigma = shift u / (1 + (shift - 1) u). Losses have no further weight, because with a
    weight beta would depend on the timestep. The sampling can have the same effect on the expected loss as a published
    weight.

    Args:
        shift: `inference`: that of the pipeline's scheduler, which with dynamic shifting depends on the image size, so
            that training uses the noise levels of drawing. `script`: that of diffusers' training script for the family,
            which is 1 if the scheduler shifts dynamically. Or a number, 1 for none.
        sampling: how u is drawn. `logit_normal`: sigmoid of N(mean, std^2), as in SD3's paper and script. `uniform`: as
            in diffusers' scripts for FLUX, Qwen-Image, Z-Image and SANA. `mode` (with scale 1.29) and `cosmap`: as in
            SD3's paper.
        mean: mean of the logit-normal distribution.
        std: standard deviation of the logit-normal distribution.
        assistant: a LoRA file that undoes the distillation of a few-step student (FLUX.1-schnell, Z-Image-Turbo), so
            that it can be trained: it is added, frozen, to policy and reference in training, and left out of drawing
            and of what is exported. Required for a student, refused for families without such files; null: none.
        encoder_dtype: as in `BackboneSettings`.
        denoiser_dtype: as in `BackboneSettings`.
        denoiser_quantization: as in `BackboneSettings`.

    Raises:
        ValueError: ``shift`` or ``std`` is not above 0.
    """

    def __init__(
        self,
        shift: float | Literal["inference", "script"] = "inference",
        sampling: Literal["logit_normal", "uniform", "mode", "cosmap"] = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        encoder_dtype: Dtype = "float32",
        denoiser_dtype: Dtype = "float32",
        denoiser_quantization: Quantization | None = None,
        assistant: str | None = None,
    ) -> None:
        super().__init__(encoder_dtype, denoiser_dtype, denoiser_quantization)
        if not isinstance(shift, str) and not 0 < shift < float("inf"):
            raise ValueError(f"`model.init_args.backbone.init_args.shift` must be above 0, got {shift}")
        if not 0 < std < float("inf"):
            raise ValueError(f"`model.init_args.backbone.init_args.std` must be above 0, got {std}")
        self.shift = shift
        self.sampling = sampling
        self.mean = mean
        self.std = std
        self.assistant = assistant


class GuidedFlowSettings(FlowSettings):
    """Families with embedded guidance, where the network gets the scale as an input: FLUX.1-dev and FLUX.2-dev.

    Args:
        guidance: the network's guidance input in training; 3.5 is the value of diffusers' scripts, whose READMEs also
            use 1. Drawing has its own setting (`drawing.guidance`). Networks without this input ignore it.
        shift: as in `FlowSettings`.
        sampling: as in `FlowSettings`.
        mean: as in `FlowSettings`.
        std: as in `FlowSettings`.
        assistant: as in `FlowSettings`.
        encoder_dtype: as in `BackboneSettings`.
        denoiser_dtype: as in `BackboneSettings`.
        denoiser_quantization: as in `BackboneSettings`.

    Raises:
        ValueError: as `FlowSettings`, or ``guidance`` is below 0.
    """

    def __init__(
        self,
        guidance: float = 3.5,
        shift: float | Literal["inference", "script"] = "inference",
        sampling: Literal["logit_normal", "uniform", "mode", "cosmap"] = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        encoder_dtype: Dtype = "float32",
        denoiser_dtype: Dtype = "float32",
        denoiser_quantization: Quantization | None = None,
        assistant: str | None = None,
    ) -> None:
        super().__init__(shift, sampling, mean, std, encoder_dtype, denoiser_dtype, denoiser_quantization, assistant)
        if not 0 <= guidance < float("inf"):
            raise ValueError(f"`model.init_args.backbone.init_args.guidance` must be 0 or more, got {guidance}")
        self.guidance = guidance
