"""The layouts that LoRA files come in, brought to one: factors A and B by `{component}.{layer}`.

Read are diffusers' own files (new and old), PEFT's adapter folders, kohya-style files and those with the prefixes that
other tools write. A layer's name is looked up in the network where it is at hand; else it must be one that can exist.
What is not a plain LoRA is refused by name: adding up such updates would be wrong in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lit_safety.adapters.lora import WEIGHTS_NAME, find_weights
from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json
from lit_safety.core.weights import not_readable

#: What in a key's name gives away an update that is not a plain low-rank product, and what to call it; `$` is its end.
REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA: its update also rescales the base model's own weights",
    "dora_scale": "DoRA: its update also rescales the base model's own weights",
    "lora_B.bias": "a LoRA with bias (lora_bias)",
    "lora_up.bias": "a LoRA with bias (lora_bias)",
    "lora_mid": "LoCon with a Tucker core",
    "hada_w": "LoHa",
    "lokr_": "LoKr",
    "lora_embedding": "a LoRA on an embedding",
    "lora_diag": "KaSA: it also cuts the base model's own weights",
    ".diff$": "a file of whole weight differences",
    ".diff_b$": "a file of whole weight differences",
}
#: The same by a setting in the file's metadata: a true value is refused.
REFUSED_SETTINGS = {
    "use_dora": "DoRA: its update also rescales the base model's own weights",
    "lora_bias": "a LoRA with bias (lora_bias)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA: it also cuts the base model's own weights",
    "monteclora_config": "MonteCLoRA: its update is drawn again at every pass",
    "arrow_config": "Arrow: it chooses among adapters for every token",
    "alora_invocation_tokens": "aLoRA: it is on for a part of the tokens only",
    "target_parameters": "a LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "an adapter with new embeddings in it (trainable_token_indices)",
    "layer_replication": "a LoRA on replicated layers",
    "modules_to_save": "an adapter with whole layers in it (modules_to_save)",
}
#: These start from a changed base model, so that their factors alone are not the update.
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: Of these, what stock diffusers loads into a pipeline.
_STOCK = ("lora_magnitude_vector", "use_dora", "lora_B.bias", "lora_bias", "lokr_")

#: How the names of a component's layers begin.
COMPONENTS = {
    "unet": ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    "transformer": (
        *("transformer_blocks", "single_transformer_blocks", "context_embedder", "x_embedder", "time_text_embed"),
        *("pos_embed", "norm_out", "proj_out", "proj_in", "proj_out_1", "proj_out_2", "layers", "blocks"),
        *("context_refiner", "noise_refiner", "siglip_refiner", "cap_embedder", "t_embedder", "siglip_embedder"),
        *("all_x_embedder", "all_final_layer", "final_layer", "final_linear", "img_in", "txt_in", "time_in"),
        *("time_embed", "time_guidance_embed", "guidance_embed", "guidance_in", "vector_in", "time_caption_embed"),
        *("time_condition_embed", "timestep_embedder", "condition_embedder", "context_embedder_2", "time_mod_proj"),
        *("caption_projection", "caption_norm", "adaln_single", "patch_embed", "patch_embedding", "text_fusion"),
        *("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
        *("double_stream_blocks", "single_stream_blocks", "distilled_guidance_layer", "p_embedder", "text_proj"),
        *("adaLN_modulation", "modulation", "image_projector", "glyph_projector", "prior_projector"),
    ),
}
#: What the layers of CLIP's text encoder begin with in older releases of transformers, and in its files.
TEXT_MODEL = "text_model."

_ADVICE = "plain LoRA files are read only (fuse this one into a pipeline instead)"

_TRANSFORMER_BLOCK = (
    r"transformer_blocks\.\d+\."
    r"(?:attn\d?\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_[kv]_ip\.\d+)|ff\.net\.(?:0\.proj|2)|proj_in|proj_out)"
)
_UNET_BLOCK = (
    rf"(?:(?:attentions|motion_modules|temp_attentions)\.\d+\."
    rf"(?:proj_in|proj_out|{_TRANSFORMER_BLOCK}|to_[qkv]|to_out\.0|add_[kv]_proj)"
    r"|resnets\.\d+\.(?:conv1|conv2|conv_shortcut|time_emb_proj)|(?:down|up)samplers\.\d+\.conv)"
)
#: Every layer that a network of a kind can have, whatever its size.
_CAN_EXIST = {
    "unet": re.compile(
        r"conv_in|conv_out|encoder_hid_proj|(?:time|add)_embedding\.(?:linear_[12]|cond_proj)|class_embedding\.linear_[12]"
        rf"|(?:mid_block|(?:down|up)_blocks\.\d+)\.{_UNET_BLOCK}"
    ),
    "transformer": re.compile(rf"(?:{'|'.join(COMPONENTS['transformer'])})(?:\.(?:[A-Za-z]\w*|\d+(?:-\d+)?))*"),
    "text_encoder": re.compile(
        r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])|text_projection"
        r"|encoder\.block\.\d+\.layer\.[01]\.(?:SelfAttention\.[qkvo]|DenseReluDense\.(?:wi(?:_[01])?|wo))"
        r"|(?:model\.)?(?:language_model\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    ),
}
#: A UNet's convolutions, and those of them whose kernels are larger than 1 x 1 in every UNet.
_CONVOLUTION = re.compile(r"(?:^|\.)(?:conv\w*|proj_in|proj_out)$")
_SPATIAL = re.compile(r"resnets\.\d+\.conv[12]$|samplers\.\d+\.conv$")
#: Pieces that no layer's name has: what wrappers and savers put into them.
_WRAPPERS = frozenset({"base_model", "module", "_orig_mod", "base_layer", "default", "unet", "diffusion_model"})

#: The parts of names that kohya's files write with underscores; the longest are looked for first.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers", "conv"),
    *("transformer_blocks", "attn", "attn1", "attn2", "ff", "net", "proj", "to_q", "to_k", "to_v", "to_out"),
    *("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
    *("time_embedding", "add_embedding", "linear_1", "linear_2", "motion_modules"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("time_embed", "label_emb", "out", "op"),
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2"),
    *("text_projection", "block", "layer", "SelfAttention", "DenseReluDense", "wi_0", "wi_1", "wi", "wo", "q", "k"),
    *("v", "o"),
)
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(?:_|$)")

_FACTORS = (
    re.compile(r"(?P<layer>.+)\.lora_(?P<side>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight"),
    re.compile(r"(?P<layer>.+?)(?P<old>\.lora_linear_layer|\.lora|_lora)\.(?P<side>down|up)\.weight"),
)
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
#: How kohya's names of a component begin.
_UNDERSCORED = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_DENOISERS = ("unet", "transformer")
_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_[23])?)\.")
_TOOLS = re.compile(r"(?:base_model\.model|(?:model\.)?diffusion_model|module|_orig_mod)\.")
#: Names inside a block of the networks that Stable Diffusion was published with, and what diffusers calls them.
_SGM_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SGM_TOP = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


@dataclass(frozen=True)
class Place:
    """A layer of a network that can take an update."""

    name: str
    """In the network."""
    shape: tuple[int, int]
    """(out, in); of a convolution in = in_channels * kh * kw."""
    kernel: tuple[int, ...]
    """(kh, kw) of a convolution; empty for a linear layer."""


#: The places of each component of a pipeline, by the layers' names.
Places = Mapping[str, Mapping[str, Place]]


class NotPlain(UserError):
    """An adapter whose update is not a plain low-rank product.

    Args:
        message: says so.
        what: what makes it one, a key or a setting.
    """

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.stock = any(mark in what for mark in _STOCK)
        """Whether stock diffusers may know how to load it."""


def places_of(network: nn.Module, component: str) -> dict[str, Place]:
    """The linear layers and ungrouped convolutions of a network, by the names that `read_lora` gives.

    Sizes are the layers' own settings, so that weights may lie in pieces, or nowhere.
    """
    found = {}
    for name, module in network.named_modules():
        if ".lora_" in name or isinstance(module, BaseTunerLayer):
            continue  # its base layer comes below it
        # An adapter keeps the layer that it is on as `base_layer`; torch.compile wraps with `_orig_mod`.
        own = re.sub(r"(?:^|\.)(?:base_layer|_orig_mod)(?=\.|$)", "", name).removeprefix(".")
        if isinstance(module, nn.Linear):
            place = Place(own, (module.out_features, module.in_features), ())
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            kernel = tuple(module.kernel_size)
            place = Place(own, (module.out_channels, module.in_channels * kernel[0] * kernel[1]), kernel)
        else:
            continue
        found[told_alike(component, own)] = place
    return found


def told_alike(component: str, layer: str) -> str:
    """The name of a layer, whichever release of transformers wrote it: newer ones leave `text_model.` out of CLIP's."""
    left_out = component.startswith("text_encoder") and layer.startswith("encoder.layers.")
    return f"{TEXT_MODEL if left_out else ''}{layer}"


def can_exist(component: str, layer: str) -> bool:
    """Whether a network of this kind can have a layer of this name."""
    kind = "text_encoder" if component.startswith("text_encoder") else component
    names = _CAN_EXIST.get(kind)
    return names is not None and names.fullmatch(layer) is not None and _WRAPPERS.isdisjoint(layer.split("."))


def refuse_keys(keys: Iterable[str], file: Path) -> None:
    """Complain about the first key that belongs to no plain LoRA.

    Raises:
        NotPlain: there is one.
    """
    for key in keys:
        for mark, name in REFUSED_KEYS.items():
            if mark in f"{key}$":
                raise NotPlain(f"{file}: {key} belongs to {name}; {_ADVICE}", key)


def refuse_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Complain about the first setting of a PEFT configuration that makes it no plain LoRA.

    Raises:
        NotPlain: there is one.
    """
    for setting, name in REFUSED_SETTINGS.items():
        if settings.get(setting):
            raise NotPlain(f"{file}: {setting} is set, so it is {name}; {_ADVICE}", setting)
    if settings.get("bias", "none") != "none":
        raise NotPlain(f"{file}: bias is {settings['bias']!r}, so the base model's biases were trained too; {_ADVICE}")
    init = str(settings.get("init_lora_weights", "")).lower()
    if init.startswith(REFUSED_INITS):
        raise NotPlain(f"{file}: init_lora_weights is {init!r}, which also changes the base model; {_ADVICE}")


@dataclass(frozen=True)
class Layout:
    """A LoRA file's tensors by what they are for."""

    factors: dict[str, dict[str, Tensor]]
    """`{component}.{layer}` -> A and B, of which one may be missing."""
    alphas: dict[str, float]
    """By the same names, where the file holds alphas as tensors (kohya's way)."""
    left: list[str]
    """Keys that are not part of any LoRA."""


def to_one_layout(tensors: Mapping[str, Tensor], file: Path, places: Places | None = None) -> Layout:
    """Sort a file's tensors by layer and side.

    Args:
        tensors: as the file has them.
        file: for messages.
        places: the layers that there are, where the networks are at hand.

    Raises:
        UserError: a factor is there twice, or names can only be told with the model at hand.
    """
    names = _Names(file, places, _denoiser(tensors, file, places))
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    left = []
    adapters: dict[str, str] = {}
    for key, tensor in tensors.items():
        layer, side, old = _split(key)
        if side is None or (side == "alpha" and tensor.numel() != 1):
            left.append(key)
            continue
        name = names.of(layer, old)
        if (adapter := _adapter(key)) is not None:
            other = adapters.setdefault(name.partition(".")[0], adapter)
            if other != adapter:
                raise UserError(
                    f"{file} holds layers of {other} and {adapter}, as of two adapters; give each a file of its own"
                )
        if side == "alpha":
            if float(tensor) == 0:
                raise UserError(
                    f"{file}: {key} is 0, which some programs read as no update and others as the rank; write what is "
                    "meant"
                )
            if alphas.setdefault(name, float(tensor)) != float(tensor):
                raise UserError(f"{file} holds two alphas of {name}; keep one of the adapters in it")
        elif factors.setdefault(name, {}).setdefault(side, tensor) is not tensor:
            raise UserError(f"{file} holds {name} twice, as of two adapters; give each a file of its own")
    return Layout(factors, alphas, left)


def _split(key: str) -> tuple[str, str | None, bool]:
    """Layer, side (A, B, alpha; None: neither) and whether the layer has one of diffusers' old names."""
    for pattern in _FACTORS:
        if (found := pattern.fullmatch(key)) is not None:
            return found["layer"], _SIDES[found["side"]], found.groupdict().get("old") is not None
    if key.endswith(".alpha"):
        body = re.sub(r"\.lora_[AB]\.weight$|(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight$", "", key[:-6])
        return re.sub(r"_lora$|\.lora$", "", body), "alpha", ".processor." in body or body.endswith("_lora")
    return key, None, False


def _adapter(key: str) -> str | None:
    """The adapter's name that PEFT may write into a key; None: it has none."""
    found = _FACTORS[0].fullmatch(key)
    return None if found is None else found["adapter"]


def _bare(layer: str) -> tuple[str | None, str]:
    """The component that a dotted name says, and the layer without anything that tools put in front."""
    component = None
    while True:
        if (tool := _TOOLS.match(layer)) is not None:
            layer = layer[tool.end() :]
        elif (found := _COMPONENT.match(layer)) is not None and component in (None, found[1]):
            component, layer = found[1], layer[found.end() :]
        else:
            return component, layer.replace("._orig_mod.", ".")


def _denoiser(keys: Iterable[str], file: Path, places: Places | None) -> str | None:
    """The component of those layers that do not say it."""
    if places is not None and (found := [name for name in _DENOISERS if name in places]):
        return found[0]
    tops = set()
    for key in keys:
        layer, side, _ = _split(key)
        component, bare = _bare(layer)
        if side is not None and component is None and not layer.startswith(tuple(_UNDERSCORED)):
            tops.add(_from_sgm(bare, None, file).split(".", 1)[0])
    return next((component for component, known in COMPONENTS.items() if tops and tops <= set(known)), None)


class _Names:
    """What diffusers calls a layer.

    Args:
        file: for messages.
        places: the layers that there are, where the networks are at hand.
        denoiser: the component of layers that do not say theirs; None: nobody knows.
    """

    def __init__(self, file: Path, places: Places | None, denoiser: str | None) -> None:
        self.file, self.places, self.denoiser = file, places, denoiser
        self.told: dict[str, dict[str, list[str]]] = {}
        """Component -> kohya's name without its beginning -> the layers that it may stand for."""
        for component, known in (places or {}).items():
            told = self.told[component] = {}
            for name in known:
                for spelling in {name, name.removeprefix(TEXT_MODEL)}:
                    told.setdefault(spelling.replace(".", "_"), []).append(name)

    def of(self, layer: str, old: bool) -> str:
        """`{component}.{layer}`; what cannot be told keeps the name that it has."""
        prefix = next((prefix for prefix in _UNDERSCORED if layer.startswith(prefix)), None)
        if prefix is not None:
            return self._underscored(layer, _UNDERSCORED[prefix], layer.removeprefix(prefix))
        component, bare = _bare(layer)
        component = component or self.denoiser
        if component is None:
            return layer
        if old or ".processor." in bare:
            bare = _from_old(bare, component)
        if component == "unet":
            bare = _from_sgm(bare, self.places, self.file)
        return f"{component}.{told_alike(component, bare)}"

    def _underscored(self, layer: str, component: str, rest: str) -> str:
        if component == "unet" and self.places is not None and "unet" not in self.places and self.denoiser is not None:
            component = self.denoiser  # kohya calls every denoiser a UNet
        told = self.told.get(component, {}).get(rest, [])
        if len(told) == 1:
            return f"{component}.{told[0]}"
        dotted = _dotted(rest)
        if dotted is None:
            return layer
        if component == "unet":
            dotted = _from_sgm(dotted, self.places, self.file)
        return f"{component}.{told_alike(component, dotted)}"


def _dotted(text: str) -> str | None:
    """kohya's underscores as dots, where all words are known."""
    words, place = [], 0
    while place < len(text):
        found = _WORD.match(text, place)
        if found is None:
            return None
        words.append(found[1])
        place = found.end()
    return ".".join(words)


def _from_old(layer: str, component: str) -> str:
    """diffusers' attention processors and their short names, as the layers that they stand for. The same short name
    is another layer in a text encoder than in a denoiser."""
    before, _, last = layer.replace(".processor.", ".").rpartition(".")
    if component.startswith("text_encoder"):
        short = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    else:
        short = {"to_out": "to_out.0"}
    return f"{before}.{short.get(last, last)}" if before else short.get(last, last)


def _from_sgm(layer: str, places: Places | None, file: Path) -> str:
    """A UNet's layer by the names of the published Stable Diffusion, as diffusers calls it."""
    if layer in _SGM_TOP:
        return _SGM_TOP[layer]
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.+)", layer)
    if found is None:
        return layer
    where, number, rest = found[1], int(found[2]), found[4]
    if where == "middle_block":
        rest = rest if found[3] is None else f"{found[3]}.{rest}"
        kind, index = (("resnets", 0), ("attentions", 0), ("resnets", 1))[number] if number < 3 else ("", number)
        return f"mid_block.{kind}.{index}.{_SGM_RESNET.get(rest, rest)}"
    if places is None or "unet" not in places:
        raise UserError(
            f"{file}: kohya's names for SDXL blocks ({layer}) can only be told with the model at hand; give it, as "
            "--pipeline of `merge`, or write the file again with `pipe.load_lora_weights` and `pipe.save_lora_weights`"
        )
    depth = 1 + max((int(n.split(".")[3]) for n in places["unet"] if n.startswith("down_blocks.0.resnets.")), default=0)
    block, index = divmod(number - 1 if where == "input_blocks" else number, depth + 1)
    side = "down" if where == "input_blocks" else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks.{block}.{side}samplers.0.conv"
    kind = "resnets" if found[3] in (None, "0") else "attentions"
    return f"{side}_blocks.{block}.{kind}.{index}.{_SGM_RESNET.get(rest, rest)}"


# The folders that PEFT's own `save_pretrained` writes: weights, and a configuration next to them.


PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def find_peft(path: Path) -> tuple[Path, Path] | None:
    """Weights and configuration, where ``path`` is such a folder or the weights in one."""
    folder = path.parent if path.name == PEFT_WEIGHTS else path
    weights, config = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    return (weights, config) if weights.is_file() and config.is_file() else None


def peft_settings(layers: Iterable[str], config: Path, file: Path) -> dict[str, Any]:
    """The settings by names that begin with the part of a pipeline that is adapted: PEFT does not say it.

    Args:
        layers: the names that `to_one_layout` found.
        config: the configuration.
        file: the weights, for messages.

    Raises:
        UserError: the configuration cannot be read, or the layers are of no known part, or of several.
    """
    parts = {layer.split(".", 1)[0] for layer in layers}
    if len(parts) != 1 or not parts <= set(COMPONENTS):
        strange = min(layers, default="the empty file")
        raise UserError(
            f"{file}: {strange} is neither of diffusers' UNets nor of its transformers; give adapters of a denoiser, "
            "or write this one again with `pipe.save_lora_weights`"
        )
    return {f"{min(parts)}.{key}": value for key, value in read_peft_config(config).items()}


def read_peft_config(file: Path) -> dict[str, Any]:
    """PEFT's own configuration of a LoRA.

    Raises:
        UserError: it cannot be read, or is not one of a LoRA.
    """
    try:
        config = load_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file} describes no LoRA; give LoRA adapters only")
    return config


# LoRA files as low-rank factors, in and out: alpha and rank of every layer as stock diffusers and PEFT read them.


#: Where diffusers keeps the LoRA configuration in a safetensors file.
METADATA_KEY = "lora_adapter_metadata"
#: Renames a whole file that is of no layout known here, as a stock pipeline does: tensors, and alphas by name.
Convert = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, float]]]


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: delta = scale * b @ a. Rank 0 is the zero update."""

    a: Tensor
    """(r, in); of a convolution in = in_channels * kh * kw."""
    b: Tensor
    """(out, r)"""
    scale: float = 1.0
    """alpha / r, or alpha / sqrt(r) where the file says that it is rank-stabilised."""
    kernel: tuple[int, ...] = ()
    """(kh, kw) of a convolution; empty for a linear layer."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole update, (out, in)."""
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.scale


def read_lora(path: str | Path, places: Places | None = None, convert: Convert | None = None) -> dict[str, LowRank]:
    """All layers of a LoRA folder or file by `{component}.{layer}` (such as `unet.mid_block...to_q`), sorted by name.

    Args:
        path: the folder or file.
        places: the layers that there are, of every component of the pipeline; None: the networks are not at hand, and
            names only have to be possible ones.
        convert: for files of which a layer has no place otherwise.

    Raises:
        UserError: the file is missing or damaged, holds numbers that are not finite, is not a plain LoRA, or a layer
            of it has no place.
    """
    file, config = find_lora(path)
    tensors, metadata = _load(file)
    refuse_keys(tensors, file)
    layout = to_one_layout(tensors, file, places)
    if config is not None:
        metadata = peft_settings(layout.factors, config, file)
    if convert is None or not (layout.left or _homeless(layout.factors, places)):
        return _layers(layout, metadata, file, places)
    converted = _converted(layout, tensors, convert, file, places)
    return _layers(layout, metadata, file, places) if converted is None else converted


def _layers(layout: Layout, metadata: Mapping[str, Any], file: Path, places: Places | None) -> dict[str, LowRank]:
    """The updates, after a check that nothing is left over."""
    components = {name.split(".", 1)[0] for name in layout.factors}
    settings = {component: _settings(metadata, component) for component in components}
    for one in settings.values():
        refuse_settings(one, file)
    if layout.left or not layout.factors:
        strange = layout.left or sorted(f"{name}.alpha" for name in layout.alphas) or ["the empty file"]
        raise UserError(f"{file}: {_told(strange)} belongs to no plain LoRA; is the file complete, and a LoRA?")
    if half := sorted(name for name, pair in layout.factors.items() if len(pair) < 2):
        raise UserError(
            f"{file}: {len(half)} of {len(layout.factors)} layers have no pair of lora_A.weight and lora_B.weight: "
            f"{_told(half)}; is the file complete?"
        )
    if single := sorted(set(layout.alphas) - set(layout.factors)):
        raise UserError(f"{file}: there are alphas of layers without factors: {_told(single)}; is the file complete?")
    if homeless := _homeless(layout.factors, places):
        raise UserError(_no_place(homeless, layout, file, places))
    told = {component: _Alphas(one, file) for component, one in settings.items()}
    layers = {}
    for name, pair in sorted(layout.factors.items()):
        component, _, layer = name.partition(".")
        where = f"{file}: {name}"
        found = _layer(pair["A"], pair["B"], told[component], layer, layout.alphas.get(name), where)
        if places is None:
            _check_shape(found, component, layer, where)
        layers[name] = found if places is None else _fitting(found, places[component][layer], name, file)
    return layers


def _check_shape(found: LowRank, component: str, layer: str, where: str) -> None:
    """Whether an update can be that of its layer, where the network is not at hand to say so.

    Raises:
        UserError: its factors are turned, or a convolution is given where the layer is linear, or the other way round.
    """
    if found.rank > max(found.shape):
        raise UserError(
            f"{where}: has rank {found.rank} and is {found.shape[1]} -> {found.shape[0]}: its factors are turned; give "
            "lora_A.weight as (rank, in) and lora_B.weight as (out, rank)"
        )
    pixels = math.prod(found.kernel)
    if component == "unet" and (_SPATIAL.search(layer) if pixels == 1 else not _CONVOLUTION.search(layer)):
        kind = f"a convolution of {found.kernel} kernels" if found.kernel else "linear"
        raise UserError(f"{where}: its update is {kind}, and no UNet's layer of this name is; train this adapter again")


def _homeless(names: Iterable[str], places: Places | None) -> list[str]:
    """The layers that have no place, or that no network can have."""
    split = {name: tuple(name.partition(".")[::2]) for name in names}
    if places is None:
        return sorted(name for name, (component, layer) in split.items() if not can_exist(component, layer))
    return sorted(name for name, (component, layer) in split.items() if layer not in places.get(component, {}))


def _no_place(homeless: Sequence[str], layout: Layout, file: Path, places: Places | None) -> str:
    count = f"{len(homeless)} of {len(layout.factors)} layers"
    if places is None:
        return (
            f"{file}: {count} have names that no layer in a known part of a pipeline has: {_told(homeless)}; give the "
            "model it was made for (--pipeline of `merge`), or write it again with `pipe.save_lora_weights`"
        )
    return (
        f"{file} was made for another backbone: {count} have no place in this one ({', '.join(sorted(places))}): "
        f"{_told(homeless)}; load it into the model it was trained on"
    )


def _told(names: Sequence[str]) -> str:
    """The first few."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _fitting(found: LowRank, place: Place, name: str, file: Path) -> LowRank:
    """The update in the shape of its layer: a kernel of 1 x 1 is the same as none."""
    if found.shape != place.shape or (found.kernel != place.kernel and math.prod(found.kernel + place.kernel) != 1):
        kinds = [f"{kernel} kernels" if kernel else "linear" for kernel in (found.kernel, place.kernel)]
        raise UserError(
            f"{file} was made for another backbone: {name} is {found.shape[1]} -> {found.shape[0]} ({kinds[0]}), the "
            f"layer has {place.shape[1]} -> {place.shape[0]} ({kinds[1]}); load it into the model it was trained on"
        )
    return LowRank(found.a, found.b, found.scale, place.kernel)


def _converted(
    layout: Layout, tensors: Mapping[str, Tensor], convert: Convert, file: Path, places: Places | None
) -> dict[str, LowRank] | None:
    """The updates by the names that ``convert`` gives; None: it knows no better, or loses something."""
    whole = [name for name, pair in layout.factors.items() if len(pair) == 2]
    if layout.left or len(whole) < len(layout.factors):
        return None
    try:
        state, alphas = convert(dict(tensors))
        again = to_one_layout(state, file, places)
        named = {f"{name.removesuffix('.alpha')}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
        again.alphas.update(to_one_layout(named, file, places).alphas)
    except (UserError, ValueError, LookupError, AttributeError, RuntimeError, TypeError, AssertionError):
        return None
    if len(_homeless(again.factors, places)) >= len(_homeless(layout.factors, places)):
        return None  # the file's own names say more than what came of them
    layers = _layers(again, {}, file, places)
    none = _Alphas({}, file)
    given = [_layer(pair["A"], pair["B"], none, "", layout.alphas.get(n), n) for n, pair in layout.factors.items()]
    before, after = (sum(_size(layer) for layer in some) for some in (given, layers.values()))
    # Layers may be cut or put together (q, k and v in one), but all of the update must be there.
    return layers if math.isclose(before, after, rel_tol=1e-2) else None


def _size(layer: LowRank) -> float:
    """The squared Frobenius norm of the update: tr(b'b aa')."""
    a, b = layer.a.double(), layer.b.double()
    return float(((b.T @ b) * (a @ a.T)).sum()) * layer.scale**2


def find_lora(path: str | Path) -> tuple[Path, Path | None]:
    """The weights of a LoRA folder (or the file itself), and PEFT's configuration where the folder is PEFT's.

    Raises:
        UserError: there are none, or nobody can tell which are meant.
    """
    path = Path(path)
    own = find_peft(path)
    if path.is_dir() and own is not None and (path / WEIGHTS_NAME).is_file():
        raise UserError(f"{path} holds both {own[0].name} and {WEIGHTS_NAME}: name the file that is meant")
    if own is not None:
        return own
    if path.is_dir() and not (path / WEIGHTS_NAME).is_file():
        found = sorted(path.glob("[!.]*.safetensors"))
        if len(found) == 1:
            path = found[0]
    if path.name == PEFT_WEIGHTS and path.is_file():
        raise UserError(f"{path}: there is no {PEFT_CONFIG} next to it, which says its alpha; give PEFT's whole folder")
    return find_weights(path), None


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            raw = (handle.metadata() or {}).get(METADATA_KEY)
        metadata = load_json(raw, finite=False) if raw else {}  # what reads a number checks it
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(not_readable(file, error)) from error
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: its {METADATA_KEY} is not a JSON object")
    for key, tensor in tensors.items():
        try:
            finite = bool(torch.isfinite(tensor.float()).all())  # in float, which 8-bit numbers need
        except NotImplementedError as error:
            raise UserError(f"{file}: {key} is of {tensor.dtype}, which no LoRA is; train it again") from error
        if not finite:
            raise UserError(f"{file}: {key} holds numbers that are not finite; train this adapter again")
    return tensors, metadata


def _settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    if "lora_alpha" in metadata:  # of a single network, as its own `save_lora_adapter` writes
        return dict(metadata)
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _layer(a: Tensor, b: Tensor, alphas: _Alphas, layer: str, stored_alpha: float | None, where: str) -> LowRank:
    settings = alphas.settings
    kernel = tuple(a.shape[2:])
    if not (a.is_floating_point() and b.is_floating_point()):
        raise UserError(f"{where}: factors of {a.dtype} and {b.dtype} are not floating-point numbers; write them so")
    of_a_layer = len(a.shape) in (2, 4) and len(b.shape) == len(a.shape) and a.numel() > 0 and b.numel() > 0
    if not of_a_layer or b.shape[1] != a.shape[0] or any(side != 1 for side in b.shape[2:]):
        raise UserError(
            f"{where}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} are not a LoRA of a linear layer or an "
            "ungrouped convolution"
        )
    rank = a.shape[0]
    alpha = rank if stored_alpha is None else stored_alpha  # diffusers' convention where a file says nothing
    if "lora_alpha" in settings or (settings and stored_alpha is None):
        alpha = alphas.of(layer, where)
        if stored_alpha is not None and not math.isclose(alpha, stored_alpha, rel_tol=1e-2):
            raise UserError(f"{where}: its alpha is {stored_alpha:g} by its tensor and {alpha:g} by its settings")
    stabilised = bool(settings.get("use_rslora"))
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    return LowRank(a.flatten(1), b.flatten(1), scale, kernel)


class _Alphas:
    """Every layer's alpha by PEFT's settings, of which `alpha_pattern` holds regular expressions: somebody else's, so
    that each has a second or a few and no more.

    Args:
        settings: a component's.
        file: for messages.
    """

    def __init__(self, settings: Mapping[str, Any], file: Path) -> None:
        self.settings = settings
        given = settings.get("alpha_pattern") or {}
        try:
            if not isinstance(given, Mapping):
                raise TypeError("alpha_pattern is not an object")
            # As PEFT puts it around them.
            self.patterns = [(regex.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in given.items()]
        except (TypeError, ValueError, OverflowError, RecursionError, regex.error) as error:
            raise UserError(f"{file}: its settings tell no alpha ({error}); is the file whole?") from error

    def of(self, layer: str, where: str) -> float:
        try:
            told = (self._told(spelling) for spelling in (layer, layer.removeprefix(TEXT_MODEL)))
            found = next((alpha for alpha in told if alpha is not None), None)
            alpha = float(self.settings["lora_alpha"] if found is None else found)
        except TimeoutError as error:
            raise UserError(
                f"{where}: a pattern of its alpha_pattern takes too long; write it out by layers"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: its settings tell no alpha ({error}); is the file whole?") from error
        if not math.isfinite(alpha):
            raise UserError(f"{where}: its alpha is {alpha}; train this adapter again")
        return alpha

    def _told(self, layer: str) -> Any:
        return next((alpha for pattern, alpha in self.patterns if pattern.match(layer, timeout=1)), None)


def write_lora(file: Path, layers: Mapping[str, LowRank]) -> Path:
    """Write `file` as stock `load_lora_weights` reads it; layers are named `{component}.{layer}`.

    Layers of rank 0 are left out: they change nothing.

    Raises:
        UserError: no layer is left.
        OSError: the file cannot be written.
    """
    kept = {name: layers[name] for name in sorted(layers) if layers[name].rank > 0}
    if not kept:
        raise UserError(f"{file}: the adapter would change nothing, no layer has an update")
    tensors = {}
    for name, layer in kept.items():
        for side, factor in zip("AB", factors_of(layer), strict=True):
            tensors[f"{name}.lora_{side}.weight"] = factor
    metadata: dict[str, Any] = {}
    for component in sorted({name.split(".", 1)[0] for name in kept}):
        prefix = f"{component}."
        own = {name.removeprefix(prefix): layer for name, layer in kept.items() if name.startswith(prefix)}
        metadata |= {prefix + key: value for key, value in configuration(own, component).items()}
    # In two steps: a full disk is an OSError then, as for every other file.
    file.write_bytes(save(tensors, {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}))
    return file


def factors_of(layer: LowRank) -> tuple[Tensor, Tensor]:
    """A and B in the shapes of PEFT's layers: of a convolution A has its kernels, and B kernels of 1 x 1."""
    ones = (1,) * len(layer.kernel)
    channels = layer.shape[1] // math.prod(layer.kernel)
    a = layer.a.reshape(layer.rank, channels, *layer.kernel).contiguous()
    return a, layer.b.reshape(layer.shape[0], layer.rank, *ones).contiguous()


def configuration(layers: Mapping[str, LowRank], component: str = "unet") -> dict[str, Any]:
    """What PEFT's `LoraConfig` needs to give every layer its own rank and scale.

    Args:
        layers: by their names in the network.
        component: of a text encoder only the ends of names count, since releases of transformers differ in the rest.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _tidy(layer.scale * layer.rank) for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name, component): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(name, component): a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(_ending(name, component) for name in layers),
    }


def _ending(layer: str, component: str) -> str:
    """The layer's name without what only some releases of transformers begin it with; PEFT matches names' ends."""
    return layer.removeprefix(TEXT_MODEL) if component.startswith("text_encoder") else layer


def _pattern(layer: str, component: str) -> str:
    """PEFT matches the end of a layer's name; `^` makes that the whole name, as diffusers writes it.

    Text encoders are called by other names in other releases of transformers, so there only the end is matched.
    """
    whole = "" if component.startswith("text_encoder") else "^"
    return whole + re.escape(_ending(layer, component))


def _tidy(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
