"""The model cards that a fit leaves next to its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_safety.data.protocols import WithTrain, datamodule_of
from lit_safety.report.card import WARNING, Card, code, last_validation, run_settings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_safety.modules.preference import PreferenceModule
    from lit_safety.modules.psa import PSA


def adapter_card(trainer: Trainer, module: PreferenceModule, export: str) -> Card:
    """The card of an export of a preference module: an adapter, or a whole pipeline."""
    settings = {name: value for name, value in vars(module.objective).items() if not name.startswith("_")}
    settings["steps"] = trainer.global_step
    group = trainer.optimizers[0].param_groups[0]
    settings |= {"learning_rate": getattr(trainer.optimizers[0], "defaults", group)["lr"]}
    own = module.export_settings(export)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    if "category" in own:
        metrics = {k: v for k, v in metrics.items() if k.endswith(f"/{own['category']}")}
    adapter, base = export != "pipeline", code(module.pretrained)
    judged = (
        "Images judged before and after are made by `python -m lit_safety evaluate "
        f"--{'adapter' if adapter else 'arms.aligned.pipeline'} THIS_FOLDER`."
    )
    facts = (
        f"- Base model: {base}\n- Data: {code(str(train_shards(trainer)))}\n"
        f"- Method: {type(module).__name__} with {type(module.objective).__name__}"
    )
    return Card(
        "Safety adapter" if adapter else "Aligned pipeline",
        f"{(_ADAPTER if adapter else _PIPELINE).format(base=base)}\n\n{facts}",
        [run_settings(settings | own), last_validation(metrics, note=judged)],
        module.pretrained,
        [*(["lora"] if adapter else []), "text-to-image", "safety", "preference-optimisation"],
    )


_ADAPTER = f"""\
A LoRA that makes {{base}} draw less of the harm that it was trained against. Load it with

    pipe.load_lora_weights("THIS_FOLDER")

{WARNING}"""
_PIPELINE = """\
{base} with a denoiser that was trained to draw less harm. It is a whole pipeline:

    pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")

It cannot stop people who have the weights: they can train the harm back."""


def train_shards(trainer: Trainer) -> str | list[str] | None:
    """The training pairs, for a card."""
    data = datamodule_of(trainer)
    return data.train if isinstance(data, WithTrain) else "unknown"


def user_card(trainer: Trainer, module: PSA) -> Card:
    """The card of a user adapter."""
    objective = {name: value for name, value in vars(module.objective).items() if not name.startswith("_")}
    settings = objective | {
        "data": train_shards(trainer),
        "user_tokens": module.user_tokens,
        "embedding_dim": module.table.dimension,
        "user_dropout": module.user_dropout,
        "joint_dropout": module.joint_dropout,
        "prompt_dropout": module.prompt_dropout,
        "lora": f"rank {module.lora.rank}, alpha {module.lora.alpha:g}" if module.has_lora else "none",
        "steps": trainer.global_step,
    }
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    text = f"""\
User attention for {code(module.pretrained)} (Personalized Safety Alignment, arXiv 2508.01151): it draws within the
bounds of the given user.

    from lit_safety.adapters import load_psa

    load_psa(pipe, "THIS_FOLDER", users="users.safetensors")
    pipe("a prompt", user="0000033")

A user is an embedding of {module.table.dimension} numbers, made by the text model of the training users. Without a
user, or with an unknown one, it draws for the null user, which was trained to prefer the safe image of every pair.

**It cannot be enforced.** A scale of 0 is the base model, a negative scale pushes away from the user's bounds, and the
person who chooses the user chooses the bounds."""
    return Card(
        "User adapter",
        text,
        [run_settings(settings, f"Method: PSA with {type(module.objective).__name__}"), last_validation(metrics)],
        module.pretrained,
        ["text-to-image", "safety", "personalisation", "preference-optimisation"],
    )
