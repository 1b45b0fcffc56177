"""A LoRA policy by PEFT, its reference (the same network with the adapters off), and its file in stock diffusers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_safety.core.errors import UserError

# PEFT brings transformers: it is imported where an adapter is attached, so that a configuration is read without it.
if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

#: The file name that diffusers writes and looks for.
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
#: Attention projections of self- and cross-attention, as the published trainers adapt them.
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class LoRA:
    """A low-rank adapter on the denoiser's linear layers, trained in fp32 for any precision of the frozen weights.

    Args:
        rank: rank r of every adapter.
        alpha: the update is scaled by alpha / rank; null means alpha = rank.
        target_modules: endings of the names of the layers that get an adapter; null: those of the model's family,
            including text streams and fused blocks (for a UNet the attention projections).
        blocks: beginnings of the names of the blocks that are adapted; null: all. With [mid_block, up_blocks] the
            backward pass of a UNet ends at its middle, which saves time and memory.
        init: "gaussian" draws A from N(0, 1/r), "kaiming" as PEFT's default; B is 0 in both, so that policy and
            reference are the same function at the start.
        forward: "own" computes linear layers with fewer kernels than "peft", which is PEFT's own code: the same values,
            in fp32 on a CPU to the bit. Parameters, names and files are PEFT's in both.

    Raises:
        ValueError: if ``rank`` or ``alpha`` is not positive, or ``target_modules`` names a text encoder.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        init: Literal["gaussian", "kaiming"] = "gaussian",
        blocks: Sequence[str] | None = None,
        forward: Literal["own", "peft"] = "own",
    ) -> None:
        if rank < 1 or (alpha is not None and alpha <= 0):
            raise ValueError(f"rank must be at least 1 and alpha above 0, got rank {rank}, alpha {alpha}")
        if encoders := [name for name in target_modules or () if "text_encoder" in name]:
            raise ValueError(
                f"`lora.target_modules` names {encoders[0]}: the text encoders are frozen, because caches hold their "
                "outputs; adapt layers of the denoiser"
            )
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.target_modules = None if target_modules is None else list(target_modules)
        self.init = init
        self.blocks = None if blocks is None else list(blocks)
        self.forward = forward

    def with_targets(self, targets: Sequence[str]) -> LoRA:
        """The same on ``targets``, if no layers were named."""
        if self.target_modules is not None:
            return self
        return LoRA(self.rank, self.alpha, targets, self.init, self.blocks, self.forward)

    def attach(self, denoiser: nn.Module, adapter: str) -> list[nn.Parameter]:
        """Put the adapter called ``adapter`` on ``denoiser`` and make it trainable; returns its parameters.

        Raises:
            UserError: if no layer's name ends in one of ``target_modules`` and begins with one of ``blocks``.
        """
        from peft import LoraConfig

        model: Any = denoiser
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides by it; an integer is not needed
            target_modules=self._targets(),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        try:
            model.add_adapter(config, adapter_name=adapter)
        except ValueError as error:
            within = "" if self.blocks is None else f" within `lora.blocks` {self.blocks}"
            raise UserError(
                f"`lora.target_modules` {self.target_modules} match 0 layers of {type(denoiser).__name__}{within}; "
                f"for diffusion models the attention projections are {list(ATTENTION_PROJECTIONS)}"
            ) from error
        parameters = [p for name, p in denoiser.named_parameters() if f".{adapter}." in name]
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for layer in adapter_layers(denoiser):
            # Autocast casts by itself; PEFT would widen a layer's input first, and to_q, to_k, to_v each keep a copy.
            layer.cast_input_dtype_enabled = False  # type: ignore[attr-defined]
        if self.forward == "own":
            from lit_safety.adapters.lora_linear import use_own_forward

            use_own_forward(denoiser)
        return parameters

    def _targets(self) -> list[str] | str:
        """The form that PEFT needs: endings of names, or a pattern for whole names."""
        named = list(ATTENTION_PROJECTIONS) if self.target_modules is None else self.target_modules
        if self.blocks is None:
            return named
        blocks, endings = ("|".join(map(re.escape, names)) for names in (self.blocks, named))
        return rf"(?=({blocks})\.)(.*\.)?({endings})"

    def draw(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
        """New fp32 weights of an adapter's parameters by name: A drawn from ``seed`` as `init` says, B 0."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, shape in shapes.items():
            weight = drawn[name] = torch.zeros(tuple(shape))
            if ".lora_B." in name:
                continue
            if self.init == "gaussian":
                weight.normal_(0, 1 / self.rank, generator=generator)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        return drawn


@contextmanager
def adapters_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Inside, the given PEFT layers compute only their base layer.

    PEFT's own switch also sets ``requires_grad`` of every adapter at every call. That would unfreeze adapters which
    must stay frozen, and would walk over the model twice a step. Leave the context before any backward.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_metadata(denoiser: nn.Module, adapter: str) -> dict[str, Any]:
    """PEFT's settings of an adapter as its file stores them, including alpha and rank.

    PEFT holds sets, whose order differs between processes. They are sorted, so that equal weights give equal files.
    """
    model: Any = denoiser
    settings = model.peft_config[adapter].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """All PEFT layers of ``model``, in order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def find_weights(path: str | Path) -> Path:
    """The safetensors file of a LoRA folder (or the file itself).

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        if path.is_dir() and pickled.is_file():
            file = pickled
        else:
            raise UserError(f"no adapter at {path}: expected a folder with {WEIGHTS_NAME}, or such a file")
    if file.suffix != ".safetensors":
        from lit_safety.core.weights import how_to_convert

        raise UserError(
            f"{file}: LoRAs are read from safetensors only (other formats can run code when loaded); "
            f"{how_to_convert(file)}, and name the new file"
        )
    return file
