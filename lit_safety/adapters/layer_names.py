"""The names of layers of denoisers and text encoders: in diffusers, and in the programs that write LoRA files.

All names become `{component}.{layer}`, such as `unet.mid_block.attentions.0.proj_in`. A name is looked up in the
network if the network is loaded; else it must be a possible name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_safety.core.errors import UserError

#: The first parts of the names of a component's layers.
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
#: The prefix of CLIP's text layers in older releases of transformers, and in its files.
TEXT_MODEL = "text_model."
_TRANSFORMER_BLOCK = (
    r"transformer_blocks\.\d+\."
    r"(?:attn\d?\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_[kv]_ip\.\d+)|ff\.net\.(?:0\.proj|2)|proj_in|proj_out)"
)
_UNET_BLOCK = (
    rf"(?:(?:attentions|motion_modules|temp_attentions)\.\d+\."
    rf"(?:proj_in|proj_out|{_TRANSFORMER_BLOCK}|to_[qkv]|to_out\.0|add_[kv]_proj)"
    r"|resnets\.\d+\.(?:conv1|conv2|conv_shortcut|time_emb_proj)|(?:down|up)samplers\.\d+\.conv)"
)
#: Every layer name that a network of a kind can have, for all sizes.
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
#: Words that wrappers and saving programs add to names. They are not part of a layer's own name.
_WRAPPERS = frozenset({"base_model", "module", "_orig_mod", "base_layer", "default", "unet", "diffusion_model"})

#: Parts of names that kohya's files write with underscores; the longest are tried first.
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
#: The beginnings of kohya's names of a component.
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
#: Names inside a block of the published Stable Diffusion networks -> diffusers' names.
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
class AdaptableLayer:
    """A layer of a network to which an update can be added."""

    name: str
    """Its name in the network."""
    shape: tuple[int, int]
    """(out, in); of a convolution in = in_channels * kh * kw."""
    kernel: tuple[int, ...]
    """(kh, kw) of a convolution; empty for a linear layer."""


#: The layers of each component of a pipeline, by their names.
AdaptableLayers = Mapping[str, Mapping[str, AdaptableLayer]]


def adaptable_layers(network: nn.Module, component: str) -> dict[str, AdaptableLayer]:
    """The linear layers and ungrouped convolutions of a network, by the names that `read_lora` gives.

    Sizes come from the layers' settings, because weights may be sharded or on the meta device.
    """
    found = {}
    for name, module in network.named_modules():
        if ".lora_" in name or isinstance(module, BaseTunerLayer):
            continue  # its base layer is listed by itself
        # An adapter keeps its original layer as `base_layer`; torch.compile wraps with `_orig_mod`.
        own = re.sub(r"(?:^|\.)(?:base_layer|_orig_mod)(?=\.|$)", "", name).removeprefix(".")
        if isinstance(module, nn.Linear):
            layer = AdaptableLayer(own, (module.out_features, module.in_features), ())
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            kernel = tuple(module.kernel_size)
            layer = AdaptableLayer(own, (module.out_channels, module.in_channels * kernel[0] * kernel[1]), kernel)
        else:
            continue
        found[told_alike(component, own)] = layer
    return found


def told_alike(component: str, layer: str) -> str:
    """The name of a layer for any release of transformers: newer ones leave out `text_model.` in CLIP's names."""
    left_out = component.startswith("text_encoder") and layer.startswith("encoder.layers.")
    return f"{TEXT_MODEL if left_out else ''}{layer}"


def can_exist(component: str, layer: str) -> bool:
    """Whether a network of this kind can have a layer of this name."""
    kind = "text_encoder" if component.startswith("text_encoder") else component
    names = _CAN_EXIST.get(kind)
    return names is not None and names.fullmatch(layer) is not None and _WRAPPERS.isdisjoint(layer.split("."))


@dataclass(frozen=True)
class Layout:
    """A LoRA file's tensors by what they are for."""

    factors: dict[str, dict[str, Tensor]]
    """`{component}.{layer}` -> A and B, of which one may be missing."""
    alphas: dict[str, float]
    """By the same names, if the file holds alphas as tensors (as kohya's files do)."""
    left: list[str]
    """Keys that are not part of any LoRA."""


def to_one_layout(tensors: Mapping[str, Tensor], file: Path, known: AdaptableLayers | None = None) -> Layout:
    """Sort a file's tensors by layer and side.

    Args:
        tensors: of the file.
        file: for messages.
        known: the existing layers, if the networks are loaded.

    Raises:
        UserError: a factor is there twice, or names can only be resolved with the model.
    """
    names = _Names(file, known, _denoiser(tensors, file, known))
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
                    f"{file} holds layers of {other} and {adapter}, as of two adapters; save each adapter in its own "
                    "file"
                )
        if side == "alpha":
            if float(tensor) == 0:
                raise UserError(
                    f'{file}: {key} is 0, which some programs read as "no update" and others as the rank; write '
                    "what is meant"
                )
            if alphas.setdefault(name, float(tensor)) != float(tensor):
                raise UserError(f"{file} holds two alphas of {name}; keep one of the adapters in it")
        elif factors.setdefault(name, {}).setdefault(side, tensor) is not tensor:
            raise UserError(f"{file} holds {name} twice, as of two adapters; save each adapter in its own file")
    return Layout(factors, alphas, left)


def _split(key: str) -> tuple[str, str | None, bool]:
    """Layer, side (A, B, alpha; None: another tensor) and whether the layer has one of diffusers' old names."""
    for pattern in _FACTORS:
        if (found := pattern.fullmatch(key)) is not None:
            return found["layer"], _SIDES[found["side"]], found.groupdict().get("old") is not None
    if key.endswith(".alpha"):
        body = re.sub(r"\.lora_[AB]\.weight$|(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight$", "", key[:-6])
        return re.sub(r"_lora$|\.lora$", "", body), "alpha", ".processor." in body or body.endswith("_lora")
    return key, None, False


def _adapter(key: str) -> str | None:
    """The adapter's name in a key, which PEFT may write; None: the key lacks one."""
    found = _FACTORS[0].fullmatch(key)
    return None if found is None else found["adapter"]


def _bare(layer: str) -> tuple[str | None, str]:
    """The component in a dotted name, and the layer without the prefixes that tools add."""
    component = None
    while True:
        if (tool := _TOOLS.match(layer)) is not None:
            layer = layer[tool.end() :]
        elif (found := _COMPONENT.match(layer)) is not None and component in (None, found[1]):
            component, layer = found[1], layer[found.end() :]
        else:
            return component, layer.replace("._orig_mod.", ".")


def _denoiser(keys: Iterable[str], file: Path, known: AdaptableLayers | None) -> str | None:
    """The component of layers whose names do not begin with a component."""
    if known is not None and (found := [name for name in _DENOISERS if name in known]):
        return found[0]
    tops = set()
    for key in keys:
        layer, side, _ = _split(key)
        component, bare = _bare(layer)
        if side is not None and component is None and not layer.startswith(tuple(_UNDERSCORED)):
            tops.add(_from_sgm(bare, None, file).split(".", 1)[0])
    return next((component for component, known in COMPONENTS.items() if tops and tops <= set(known)), None)


class _Names:
    """diffusers' name of a layer.

    Args:
        file: for messages.
        known: the existing layers, if the networks are loaded.
        denoiser: the component of layers whose names do not state one; None: not known.
    """

    def __init__(self, file: Path, known: AdaptableLayers | None, denoiser: str | None) -> None:
        self.file, self.known, self.denoiser = file, known, denoiser
        self.told: dict[str, dict[str, list[str]]] = {}
        """Component -> kohya's name without its beginning -> the layers that it may stand for."""
        for component, layers in (known or {}).items():
            told = self.told[component] = {}
            for name in layers:
                for spelling in {name, name.removeprefix(TEXT_MODEL)}:
                    told.setdefault(spelling.replace(".", "_"), []).append(name)

    def of(self, layer: str, old: bool) -> str:
        """`{component}.{layer}`; an unknown name is kept unchanged."""
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
            bare = _from_sgm(bare, self.known, self.file)
        return f"{component}.{told_alike(component, bare)}"

    def _underscored(self, layer: str, component: str, rest: str) -> str:
        if component == "unet" and self.known is not None and "unet" not in self.known and self.denoiser is not None:
            component = self.denoiser  # kohya's names call every denoiser a UNet
        told = self.told.get(component, {}).get(rest, [])
        if len(told) == 1:
            return f"{component}.{told[0]}"
        dotted = _dotted(rest)
        if dotted is None:
            return layer
        if component == "unet":
            dotted = _from_sgm(dotted, self.known, self.file)
        return f"{component}.{told_alike(component, dotted)}"


def _dotted(text: str) -> str | None:
    """kohya's underscores as dots, where all words are known."""
    words, position = [], 0
    while position < len(text):
        found = _WORD.match(text, position)
        if found is None:
            return None
        words.append(found[1])
        position = found.end()
    return ".".join(words)


def _from_old(layer: str, component: str) -> str:
    """diffusers' attention processors and their short names -> the layers that they mean. In a text encoder a short
    name means another layer than in a denoiser."""
    before, _, last = layer.replace(".processor.", ".").rpartition(".")
    if component.startswith("text_encoder"):
        short = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    else:
        short = {"to_out": "to_out.0"}
    return f"{before}.{short.get(last, last)}" if before else short.get(last, last)


def _from_sgm(layer: str, known: AdaptableLayers | None, file: Path) -> str:
    """diffusers' name of a UNet's layer that has a name of the published Stable Diffusion."""
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
    if known is not None and "unet" in known:
        first = (n for n in known["unet"] if n.startswith("down_blocks.0.resnets."))
        depth = 1 + max((int(n.split(".")[3]) for n in first), default=0)
    else:
        depth = _published_depth(where, number, rest, file)
    block, index = divmod(number - 1 if where == "input_blocks" else number, depth + 1)
    side = "down" if where == "input_blocks" else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks.{block}.{side}samplers.0.conv"
    kind = "resnets" if found[3] in (None, "0") else "attentions"
    return f"{side}_blocks.{block}.{kind}.{index}.{_SGM_RESNET.get(rest, rest)}"


def _published_depth(where: str, number: int, rest: str, file: Path) -> int:
    """Layers in a block without a loaded network: 2, as in all UNets of Stable Diffusion and SDXL. Kohya's trainer
    writes these names only for SDXL.

    Raises:
        UserError: the layer shows that its UNet has another number.
    """
    if where == "input_blocks":  # the third of every three halves the size
        fits = number < 12 and (number % 3 == 0) is (rest == "op")
    else:
        fits = number < 12 and (number % 3 == 2 or rest != "conv")
    if not fits:
        raise UserError(
            f"{file}: {where}.{number} with {rest} is not a layer of SDXL or another published Stable Diffusion; give "
            "the model it was made for (--pipeline of `merge`), or write the file again with `pipe.load_lora_weights` "
            "and `pipe.save_lora_weights`"
        )
    return 2
