"""The interface of every model family, and helpers for prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lit_safety.adapters.lora import ATTENTION_PROJECTIONS, adapter_metadata
from lit_safety.backbones.fingerprint import part_hashes
from lit_safety.backbones.parts import NoDenoiser, Parts
from lit_safety.backbones.pipeline_index import KEY
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.adapters.assistant import Assistant


def too_long(tokenizer: Any, prompts: Sequence[str], limit: int) -> list[bool]:
    """For each prompt, whether it has more than ``limit`` tokens, including its start and end tokens.

    Encoders get the first tokens and the end token, which transformers' tokenizers keep when they truncate.
    """
    # No token is shorter than a byte, so most prompts need no tokenizer for this.
    doubtful = [number for number, prompt in enumerate(prompts) if len(prompt.encode()) > limit - 2]
    found = [False] * len(prompts)
    if doubtful:
        ids = tokenizer([prompts[number] for number in doubtful], truncation=False, verbose=False)["input_ids"]
        for number, one in zip(doubtful, ids, strict=True):
            found[number] = len(one) > limit
    return found


def encode_alike(backbone: Backbone, prompts: Sequence[str]) -> Conditioning:
    """``backbone.encode_text`` of B prompts, B rows, always in an even number of rows.

    CPU kernels process rows in pairs and round a single last row differently. A cached row must be the same as in
    training without a cache. Images come in pairs anyway.
    """
    odd = len(prompts) % 2
    rows = {name: one.float() for name, one in backbone.encode_text([*prompts, *[""] * odd]).items()}
    return {name: tensor[: len(prompts)] for name, tensor in rows.items()} if odd else rows


# The interface of every model family. A new family is one subclass and one line in `load.py`.


#: Text encoders' outputs by name (the family's own names); every tensor's first dimension is the batch. Texts of a
#: family have one length; short ones are padded. If the transformer needs it, a mask (B, L) is a separate tensor, which
#: `predict` accepts in any numeric type, because caches give floats.
Conditioning = dict[str, Tensor]


class Backbone(nn.Module, ABC):
    """A frozen text-to-image model, split into the parts that training needs.

    ``denoiser`` is the network that is aligned. It is the only registered module. The text encoders and the image
    encoder are frozen, come from ``parts`` when they are first used, and follow the denoiser's device.

    Args:
        parts: the pipeline's components.
        denoiser: False leaves the denoiser out, for work that needs only the encoders.
        settings: settings of the family's class (`SETTINGS`); None: its defaults.

    Raises:
        UserError: the settings are of another class.
    """

    #: The stock pipeline of the family.
    PIPELINE: ClassVar[Any]
    #: The component that is aligned.
    DENOISER: ClassVar[str] = "unet"
    #: Components whose weights decide the content of a cache of latents and text; a pipeline may lack some of them.
    ENCODERS: ClassVar[tuple[str, ...]] = ()
    #: For every text encoder: (tokenizer, largest number of tokens; None: as the tokenizer says).
    TOKENIZERS: ClassVar[tuple[tuple[str, int | None], ...]] = ()
    #: The class of the family's settings.
    SETTINGS: ClassVar[type[BackboneSettings]] = BackboneSettings
    #: Endings of the names of the layers that a LoRA adapts by default.
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ATTENTION_PROJECTIONS
    #: The latents' sides are multiples of this number.
    PATCH: ClassVar[int] = 1

    denoiser: nn.Module
    settings: BackboneSettings
    pixels_a_latent: int = 1
    """How many pixels one latent covers in each direction."""
    assistant: Assistant | None = None
    """Undoes the distillation of a few-step student in `predict`; what the stock pipeline draws is the student's."""

    def __init__(self, parts: Parts, denoiser: bool = True, settings: BackboneSettings | None = None) -> None:
        super().__init__()
        self.settings = self._checked(settings)
        parts.dtypes = {name: getattr(torch, self.settings.encoder_dtype) for name in parts.index.components
                        if name.startswith("text_encoder")} | {
                        self.DENOISER: getattr(torch, self.settings.denoiser_dtype)}  # fmt: skip
        if self.settings.denoiser_quantization is not None:
            parts.quantizations = {self.DENOISER: self.settings.denoiser_quantization}
        self.parts = parts
        self.denoiser = parts.get(self.DENOISER) if denoiser else NoDenoiser()
        self.inference_scheduler = parts.get("scheduler")

    @classmethod
    def from_pretrained(
        cls, source: str, denoiser: bool = True, key: str = KEY, settings: BackboneSettings | None = None
    ) -> Backbone:
        """Load from a pipeline folder or a hub id, in fp32 unless ``settings`` say otherwise.

        Only the denoiser is loaded now; other networks are loaded when they are used.
        """
        return cls(Parts(source, key=key), denoiser, settings)

    @classmethod
    def _checked(cls, settings: BackboneSettings | None) -> BackboneSettings:
        if settings is None:
            return cls.SETTINGS()
        if type(settings) is not cls.SETTINGS:
            if issubclass(cls.SETTINGS, type(settings)):  # a base class: what it does not set is the family's default
                return cls.SETTINGS(**vars(settings))
            raise UserError(
                f"`model.init_args.backbone` is a {type(settings).__name__}, but {cls.__name__} reads a "
                f"lit_safety.backbones.{cls.SETTINGS.__name__}: name that as its class_path"
            )
        return settings

    def lora_targets(self) -> list[str]:
        """Endings of the names of the layers that a LoRA adapts by default; some may be whole names."""
        return list(self.LORA_TARGETS)

    def left_out(self, targets: Sequence[str]) -> tuple[list[str], int]:
        """The layers of `lora_targets` that ``targets`` (endings too) leaves out; and how many `lora_targets` has."""
        own, given = (tuple(f".{one}" for one in some) for some in (self.lora_targets(), targets))
        usual = [name for name, _ in self.denoiser.named_modules() if f".{name}".endswith(own)]
        return [name for name in usual if not f".{name}".endswith(given)], len(usual)

    # ---- the frozen parts

    @property
    def device(self) -> torch.device:
        """The denoiser's device, to which frozen parts are moved when they are used."""
        return next(self.denoiser.parameters()).device

    def part(self, name: str) -> Any:
        """A component of the pipeline on the denoiser's device, loaded when it is first used.

        Raises:
            UserError: it is missing or does not load.
        """
        fresh = name not in self.parts.loaded
        part = self.parts.get(name, self.device)
        # It is faster. It is set here so that the result does not depend on who loads it first: another memory format
        # rounds differently. 3D convolutions do not support it.
        if fresh and name == "vae" and all(weight.ndim <= 4 for weight in part.parameters()):
            part.to(memory_format=torch.channels_last)
        return part

    def encoders(self) -> list[str]:
        """Those of `ENCODERS` that the pipeline contains."""
        return [name for name in self.ENCODERS if self.parts.has(name)]

    def check_files(self) -> None:
        """Check that all files exist that drawing, or writing the whole pipeline, will need. No weight is read.

        Raises:
            UserError: a file is missing or damaged; names it.
        """
        self.parts.check_files(self.encoders())

    @classmethod
    def encoder_hashes(cls, source: str) -> dict[str, str]:
        """What decides the content of a cache of latents and text made by the pipeline at ``source``, from its files.

        Hashes of the encoders by component; encoders without files are left out.
        """
        return part_hashes(source, cls.ENCODERS)

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether some text encoder does not read all of it."""
        found = [False] * len(prompts)
        for name, limit in self.TOKENIZERS:
            if not self.parts.has(name):
                continue
            tokenizer = self.parts.get(name)
            cut = too_long(tokenizer, prompts, limit or tokenizer.model_max_length)
            found = [one or other for one, other in zip(found, cut, strict=True)]
        return found

    # ---- text

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> conditioning of B rows. An empty prompt gives what inference uses for no prompt.

        A prompt that is too long is truncated, but its end token is kept. Each row depends only on its own prompt.
        """

    def crop_conditioning(self, crops: Tensor) -> Conditioning:
        """Conditioning on how images were cropped, N rows; most families have none.

        Args:
            crops: (N, 6) in pixels: height and width of the stored image, top and left of the crop after scaling,
                height and width of the crop.
        """
        return {}

    # ---- images

    @abstractmethod
    def posterior(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of their latents, unscaled, float32
        (B, 2, C, h, w), contiguous. For encoders without a standard deviation it is 0.

        All computation that needs the image encoder's weights is done here.

        Raises:
            UserError: a side of the images is not a multiple of the family's unit.
        """

    @abstractmethod
    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        """Posterior (B, 2, C, h, w) -> scaled latents (B, C, h, w) float32, sampled with ``noise`` (B, C, h, w).

        It must not load the image encoder's weights; it uses only `config`.
        """

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), sampled with ``noise`` (B, C, h, w)."""
        return self.latents(self.posterior(images), noise)

    def check_size(self, images: Tensor) -> None:
        """Check that the transformer can divide images (B, 3, H, W) into its tokens.

        Raises:
            UserError: a side is not a multiple of a token's size in pixels.
        """
        unit = self.pixels_a_latent * self.PATCH
        height, width = images.shape[-2:]
        if height % unit or width % unit:
            raise UserError(
                f"images of {height}x{width} pixels: {type(self).__name__} takes sides that are multiples of {unit}: "
                "set `data.init_args.resolution` (`shards precompute --resolution`) to one, and the step of buckets"
            )

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """h and w of the latents of an image whose height and width are given in pixels."""
        return height // self.pixels_a_latent, width // self.pixels_a_latent

    # ---- the process

    @abstractmethod
    def timesteps(self, uniform: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Uniform numbers in [0, 1) (B,) -> training timesteps (B,) in the family's own unit.

        Args:
            uniform: the numbers.
            size: h and w of the latents, for families whose shift depends on it.
        """

    @abstractmethod
    def timestep_fraction(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) -> their position in [0, 1), where 0 is clean; for logging by bins."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process: x_t (B, C, h, w)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to predict at x_t: (B, C, h, w)."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction (B, C, h, w)."""

    # ---- output

    def pipeline(self) -> Any:
        """A stock diffusers pipeline for drawing that shares these weights without a copy.

        It loads the parts that were not used yet.
        """
        parts = {name: self.part(name) if self.parts.has(name) else None for name in self.ENCODERS}
        networks = {self.DENOISER: self.denoiser, "scheduler": self.inference_scheduler}
        pipe = self.PIPELINE(**parts, **networks, **self.pipeline_options())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def drawn_latents(self, drawn: Tensor) -> Tensor:
        """The stock pipeline's output for square images with `output_type="latent"` -> scaled latents (B, C, h, w)."""
        return drawn

    def given_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> the form in which the stock pipeline takes `latents`.

        It is the inverse of `drawn_latents` if the pipeline uses one form for input and output.
        """
        return latents

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments for making the stock pipeline."""
        return {}

    def save_lora(self, folder: Path, adapter: str) -> None:
        """Write one LoRA adapter of the denoiser as the file that stock ``load_lora_weights`` reads."""
        denoiser: Any = self.denoiser
        layers = get_peft_model_state_dict(denoiser, adapter_name=adapter)
        # Without the metadata alpha is lost, and readers assume alpha = rank.
        metadata = adapter_metadata(denoiser, adapter)
        named = {f"{self.DENOISER}_lora_layers": layers, f"{self.DENOISER}_lora_adapter_metadata": metadata}
        self.PIPELINE.save_lora_weights(folder, **named)
