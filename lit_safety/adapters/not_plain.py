"""What is not a plain low-rank product is refused by name: a sum of such updates would be wrong, without an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError

#: Parts of keys that show that an update is not a plain low-rank product -> what to call it; `$` is the key's end.
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
_ADVICE = "plain LoRA files are read only (fuse this one into a pipeline instead)"


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


def refuse_keys(keys: Iterable[str], file: Path) -> None:
    """Refuse the first key that does not belong to a plain LoRA.

    Raises:
        NotPlain: there is one.
    """
    for key in keys:
        for mark, name in REFUSED_KEYS.items():
            if mark in f"{key}$":
                raise NotPlain(f"{file}: {key} belongs to {name}; {_ADVICE}", key)


def refuse_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse the first setting of a PEFT configuration with which it is not a plain LoRA.

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
