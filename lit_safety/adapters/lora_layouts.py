"""The layouts that LoRA files come in, brought to one: `{component}.{layer}.lora_A.weight` and `.lora_B.weight`.

Read are diffusers' own files (new and old), PEFT's adapter folders and kohya-style files; diffusers' converters do the
renaming. What is no plain LoRA is refused by name: adding up such updates would be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_safety.errors import UserError

#: What in a key's name gives away an update that is no plain low-rank product, and what to call it.
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
    ".diff": "a file of whole weight differences",
}
#: The same by a setting in the file's metadata: a true value is refused.
REFUSED_SETTINGS = {
    "use_dora": "DoRA: its update also rescales the base model's own weights",
    "lora_bias": "a LoRA with bias (lora_bias)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA: it also cuts the base model's own weights",
    "monteclora_config": "MonteCLoRA: its update is drawn anew at every pass",
    "arrow_config": "Arrow: it chooses among adapters for every token",
    "alora_invocation_tokens": "aLoRA: it is on for a part of the tokens only",
    "target_parameters": "a LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "an adapter with new embeddings in it (trainable_token_indices)",
    "layer_replication": "a LoRA on replicated layers",
    "modules_to_save": "an adapter with whole layers in it (modules_to_save)",
}
#: These start from a changed base model, so that their factors alone are not the update.
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: How the names of a component's layers begin.
COMPONENTS = {
    "unet": ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    "transformer": (
        *("transformer_blocks", "single_transformer_blocks", "context_embedder", "x_embedder", "time_text_embed"),
        *("pos_embed", "norm_out", "proj_out"),
    ),
}

_WRITE_AGAIN = "load the file with `pipe.load_lora_weights` and write it again with `pipe.save_lora_weights`"
_ADVICE = "merge plain LoRA files only (fuse this one into a pipeline instead)"


def refuse_keys(keys: Iterable[str], file: Path) -> None:
    """Complain about the first key that belongs to no plain LoRA.

    Raises:
        UserError: there is one.
    """
    for key in keys:
        for mark, name in REFUSED_KEYS.items():
            if mark in key:
                raise UserError(f"{file}: {key} belongs to {name}; {_ADVICE}")


def refuse_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Complain about the first setting of a PEFT configuration that makes it no plain LoRA.

    Raises:
        UserError: there is one.
    """
    for setting, name in REFUSED_SETTINGS.items():
        if settings.get(setting):
            raise UserError(f"{file}: {setting} is set, so it is {name}; {_ADVICE}")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {settings['bias']!r}, so the base model's biases were trained too; {_ADVICE}")
    init = str(settings.get("init_lora_weights", "")).lower()
    if init.startswith(REFUSED_INITS):
        raise UserError(f"{file}: init_lora_weights is {init!r}, which also changes the base model; {_ADVICE}")


def to_one_layout(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Rename a file's tensors to `{component}.{layer}.lora_{A|B}.weight`.

    Returns:
        The tensors, and alpha by `{component}.{layer}` where the file holds alphas as tensors (kohya's way).

    Raises:
        UserError: diffusers knows no such layout.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    if all(".lora_A." in key or ".lora_B." in key for key in tensors):
        return dict(tensors), {}
    if any(key.startswith(("lora_unet_input_blocks", "lora_unet_output_blocks")) for key in tensors):
        raise UserError(
            f"{file}: kohya's names for SDXL blocks can only be told with the model at hand; {_WRITE_AGAIN}"
        )
    try:
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: diffusers cannot read this LoRA layout: {first_line}") from error
    named = _by_peft_names(alphas or {})
    converted = _by_peft_names(state)
    for key in converted:
        # kohya's underscores are no dots of a network that diffusers' converter does not know.
        if alphas is not None and key.startswith("unet.") and key.split(".")[1] not in COMPONENTS["unet"]:
            raise UserError(f"{file}: {key} is no layer of diffusers' UNets; {_WRITE_AGAIN}")
    return converted, {_layer_of(key): float(alpha) for key, alpha in named.items()}


def _by_peft_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename keys as PEFT does. The same short name (`to_q_lora`) is another layer in a text encoder than in a UNet."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    encoders = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    rest = {key: value for key, value in state.items() if key not in encoders}
    encoders = convert_state_dict_to_peft(encoders, original_type=StateDictType.DIFFUSERS_OLD)
    return convert_unet_state_dict_to_peft(rest | encoders)


def _layer_of(key: str) -> str:
    """`unet.x.to_q.lora_A.weight.alpha` and `unet.x.alpha` -> the layer."""
    return key.removesuffix(".alpha").split(".lora_")[0]
