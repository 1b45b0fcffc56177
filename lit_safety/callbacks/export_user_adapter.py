"""At the end of a fit: the user adapter as `load_psa` reads it, a card, and the run's resolved config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.adapters.psa_file import WEIGHTS_NAME
from lit_safety.adapters.psa_published import save_published
from lit_safety.data.atomic import atomic_folder
from lit_safety.errors import UserError
from lit_safety.modules.psa import PSA


class ExportUserAdapter(Callback):
    """At fit end writes `adapter/` with user_adapter.safetensors, README.md and config.yaml.

    Users' embeddings are not copied: they say much about people, and the adapter may be passed on.

    Args:
        folder: where to; null: `adapter` in the run's folder.
        published: also write psa_adapter.bin, which the published code reads; needs `user_tokens: 1`.
    """

    def __init__(self, folder: str | None = None, published: bool = False) -> None:
        self.folder = folder
        self.published = published

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PSA):
            raise UserError(f"ExportUserAdapter writes PSA, and {type(pl_module).__name__} is none")
        if self.published and pl_module.user_tokens != 1:
            raise UserError(
                f"`ExportUserAdapter.published`: the published layout knows one user token, `user_tokens` is "
                f"{pl_module.user_tokens}"
            )
        if self.published and pl_module.has_lora:
            raise UserError("`ExportUserAdapter.published`: the published layout has no LoRA, `lora` must be null")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PSA)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "adapter")
        with pl_module.exporting("adapter"):  # on every rank: a parameter may lie in pieces on all of them
            if trainer.is_global_zero:
                with atomic_folder(folder) as partial:
                    pl_module.save_export(partial)
                    if self.published:
                        save_published(pl_module.adapter, partial / "psa_adapter.bin")
                    config = Path(trainer.default_root_dir) / "config.yaml"
                    if config.is_file():
                        shutil.copyfile(config, partial / "config.yaml")
                    (partial / "README.md").write_text(_card(trainer, pl_module), encoding="utf-8")
                print(f"adapter: {folder / WEIGHTS_NAME}")


def _card(trainer: Trainer, module: PSA) -> str:
    objective = {name: value for name, value in vars(module.objective).items() if not name.startswith("_")}
    settings = objective | {
        "data": getattr(getattr(trainer, "datamodule", None), "train", "unknown"),
        "user_tokens": module.user_tokens,
        "embedding_dim": module.table.dimension,
        "user_dropout": module.user_dropout,
        "joint_dropout": module.joint_dropout,
        "prompt_dropout": module.prompt_dropout,
        "lora": f"rank {module.lora.rank}, alpha {module.lora.alpha:g}" if module.has_lora else "none",
        "steps": trainer.global_step,
    }
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    table = f"| metric | value |\n|---|---|\n{measured}" if metrics else "No validation was run."
    return f"""---
library_name: diffusers
base_model: {json.dumps(module.pretrained)}
tags: [text-to-image, safety, personalisation, preference-optimisation]
---

# User adapter

User attention for `{module.pretrained}` (Personalized Safety Alignment, arXiv 2508.01151): it draws within the bounds
of the user it is given.

    from lit_safety.adapters import load_psa

    load_psa(pipe, "THIS_FOLDER", users="users.safetensors")
    pipe("a prompt", user="0000033")

A user is an embedding of {module.table.dimension} numbers, made by the text model of the training users. Without a
user, or for an unknown one, the null user is drawn for, who was trained to prefer the safe image of every pair.

**It is no lock.** A scale of 0 is the base model, a negative one pushes away from the user's bounds, and whoever
chooses the user chooses the bounds.

## Settings

Method: PSA with {type(module.objective).__name__}

| setting | value |
|---|---|
{rows}

The whole resolved configuration is in `config.yaml`.

## Last validation

{table}
"""
