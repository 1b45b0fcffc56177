"""What the families of rectified flow share: the process, the target, and the distribution of training timesteps.

    x_t = (1 - sigma) x0 + sigma noise          target = noise - x0          timestep = 1000 sigma
    u ~ the sampling                            sigma = shift u / (1 + (shift - 1) u)

Dynamic shifting has shift = e^mu, and mu grows with the number of image tokens. The default (`shift: inference`) is the
scheduler's shift, dynamic or not, so that training uses the same sigmas as drawing. diffusers' training scripts
(`shift: script`) index the scheduler's stored sigmas, which are shifted only if the shift is one number and not
dynamic; u is logit-normal in SD3's script and uniform in the others. The default here is logit-normal for all.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.encoders import encode_posterior
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.settings import BackboneSettings, FlowSettings
from lit_safety.core.errors import UserError

ASSISTANT_KEY = "model.init_args.backbone.init_args.assistant"
#: The scale of `mode` sampling that SD3's paper found best.
MODE_SCALE = 1.29


def sampled(uniform: Tensor, settings: FlowSettings) -> Tensor:
    """Uniform numbers in [0, 1) -> u, by the inverse distribution function of the sampling; float64, same shape."""
    u = uniform.double()
    if settings.sampling == "logit_normal":
        return (torch.special.ndtri(u) * settings.std + settings.mean).sigmoid()
    if settings.sampling == "mode":
        return _mode(u)
    if settings.sampling == "cosmap":  # density 2 / (pi (1 - 2 u + 2 u^2)), whose distribution function can be inverted
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    return u


def _mode(u: Tensor) -> Tensor:
    v = 1 - u  # the paper draws v uniformly: 1 - v - scale (cos^2(pi v / 2) - 1 + v) falls as v rises
    return 1 - v - MODE_SCALE * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v)


def shifted(u: Tensor, shift: float) -> Tensor:
    """sigma of u: e^mu / (e^mu + 1/u - 1) is the same with shift = e^mu."""
    return shift * u / (1 + (shift - 1) * u)


def linear_mu(tokens: int, config: Any) -> float:
    """mu of dynamic shifting, linear in the number of image tokens: FLUX.1's, Qwen-Image's and SD3's pipelines'."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) / (many - few) * (tokens - few))


class RectifiedFlow(Backbone):
    """A transformer trained by rectified flow. Latents are (B, C, h, w); only `predict` packs them into tokens.

    Raises:
        UserError: the scheduler is not for flow matching, or the model is a few-step student; names its base.
    """

    DENOISER = "transformer"
    SETTINGS: ClassVar[type[BackboneSettings]] = FlowSettings
    #: Size of a transformer token in latents; the latents' sides are multiples of it.
    PATCH: ClassVar[int] = 2
    #: A published LoRA that undoes the distillation of the family's student while it is trained; None: there is none.
    ASSISTANT: ClassVar[str | None] = None

    def __init__(self, parts: Parts, denoiser: bool = True, settings: BackboneSettings | None = None) -> None:
        assistant = cast(FlowSettings, self._checked(settings)).assistant
        if assistant is None and denoiser:  # its encoders are the base's
            self.refuse_student(parts)
        if assistant is not None and self.ASSISTANT is None:
            raise UserError(
                f"`{ASSISTANT_KEY}`: no LoRA is known that undoes the distillation of a {type(self).__name__}: leave "
                "it out"
            )
        super().__init__(parts, denoiser, settings)
        if assistant is not None and denoiser:
            self._assist(assistant)
        config = self.inference_scheduler.config
        flow = hasattr(self.inference_scheduler, "scale_noise") or (
            config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
        )
        if not flow:
            raise UserError(
                f"{parts.source}: {type(self).__name__} is trained by flow matching, but its scheduler is a "
                f"{type(self.inference_scheduler).__name__} of another process: copy its scheduler/ again"
            )
        self.steps = int(config.num_train_timesteps)
        vae = parts.config("vae")
        self.scaling_factor = float(vae.get("scaling_factor") or 1.0)
        self.shift_factor = float(vae.get("shift_factor") or 0.0)
        self.pixels_a_latent = self._pixels_a_latent(vae)

    def _pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)

    @classmethod
    def instead(cls) -> str:
        """What to do with a student besides training its base, for the messages of `refuse_student`."""
        return f", or set `{ASSISTANT_KEY}` to a LoRA file that undoes the distillation, such as {cls.ASSISTANT}"

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        """Refuse a model that was distilled to draw in a few steps, because training by flow matching undoes this.

        Raises:
            UserError: the model is such a student; names the base to train instead.
        """

    def _assist(self, path: str) -> None:
        """Add an assistant to every prediction, and to nothing that the stock pipeline draws."""
        from lit_safety.adapters.assistant import Assistant
        from lit_safety.adapters.load_lora import converter

        self.assistant = Assistant(path, self.denoiser, self.DENOISER, converter(self.PIPELINE), ASSISTANT_KEY)
        self.predict = self.assistant.within(self.predict)  # type: ignore[method-assign]

    @property
    def flow(self) -> FlowSettings:
        return cast(FlowSettings, self.settings)

    # ---- images

    def posterior(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return encode_posterior(self.part("vae"), images)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        return (posterior[:, 0] + posterior[:, 1] * noise - self.shift_factor) * self.scaling_factor

    # ---- the process

    def timesteps(self, uniform: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Timesteps: the inverse distribution function at ``uniform``, float32, from the schedule's lowest to 1000."""
        u = sampled(uniform, self.flow).clamp(min=1 / self.steps)
        return (self.stretched(shifted(u, self.training_shift(size))) * self.steps).float()

    def training_shift(self, size: tuple[int, int] | None) -> float:
        """The shift for timesteps of latents of ``size`` (h, w)."""
        if not isinstance(self.flow.shift, str):
            return float(self.flow.shift)
        if self.flow.shift == "script":
            return self.script_shift()
        config = self.inference_scheduler.config
        if not config.get("use_dynamic_shifting"):
            return self.static_shift()
        if size is None:
            raise ValueError("the scheduler's shift depends on the image size: timesteps need the latents' size")
        mu = self.mu(self.tokens(*size))
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def static_shift(self) -> float:
        """The scheduler's shift if it is not dynamic."""
        config = self.inference_scheduler.config
        return float(config.get("shift", config.get("flow_shift")) or 1.0)

    def script_shift(self) -> float:
        """The shift of diffusers' training script, which indexes the stored sigmas."""
        return 1.0 if self.inference_scheduler.config.get("use_dynamic_shifting") else self.static_shift()

    def tokens(self, height: int, width: int) -> int:
        """The number of transformer tokens for latents of h x w."""
        return (height // self.PATCH) * (width // self.PATCH)

    def mu(self, tokens: int) -> float:
        """mu of dynamic shifting for an image with this number of tokens."""
        return linear_mu(tokens, self.inference_scheduler.config)

    def stretched(self, sigma: Tensor) -> Tensor:
        """Sigmas stretched as by a scheduler with `shift_terminal`: with many steps the lowest is this number."""
        terminal = self.inference_scheduler.config.get("shift_terminal")
        return sigma if not terminal or self.flow.shift != "inference" else terminal + (1 - terminal) * sigma

    def timestep_fraction(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.steps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / self.steps).view(-1, 1, 1, 1).to(latents)
        return sigma * noise + (1 - sigma) * latents

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents


# Conversion of latents into tokens and back, as most of these transformers need it.


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, h/2 w/2, 4 C) of 2 x 2 latents each; the channel index changes slowest."""
    rows, channels, height, width = latents.shape
    blocks = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, h/2 w/2, 4 C) -> (B, C, h, w)."""
    rows, _, numbers = tokens.shape
    blocks = tokens.reshape(rows, height // 2, width // 2, numbers // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(rows, numbers // 4, height, width)


def longest(mask: Tensor) -> int:
    """The length of the longest row of a mask (B, L) of any numeric type that is filled from the left."""
    return max(int((mask > 0.5).sum(1).max()), 1)


def is_student(parts: Parts, *words: str) -> bool:
    """Whether a pipeline's name says that it draws in a few steps; its files are often like those of its base."""
    *before, name = parts.source.replace("\\", "/").rstrip("/").split("/")
    if before[1:] and before[-1] == "snapshots":  # the hub's cache: models--owner--name/snapshots/revision
        name = before[-2].rsplit("--", 1)[-1]
    return any(word in name.lower() for word in words)
