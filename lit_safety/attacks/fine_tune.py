"""Fine-tune recovery: anyone can train published weights further; after how many steps is the concept back?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from lit_safety.attacks.lora_training import Recipe, read_images, shards_digest, train_weights
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt


class FineTune(Attack):
    """Train a LoRA on top of the arm, on harmful images with their own prompts.

    Args:
        shards: preference shards; the attacker's images are their rejected images of harmful prompts, without those of
            attacked prompts.
        steps: optimizer steps at each point of the curve.
        pictures: how many images the attacker has.
        batch_size: images in a step.
        lr: learning rate of AdamW, constant.
        rank: rank of the LoRA, on the attention projections.
    """

    budget: ClassVar[str] = "optimizer steps of a LoRA on harmful images"
    knows = "white box: trains the weights"
    changes_denoiser: ClassVar[bool] = True
    harmful: ClassVar[bool] = True
    """Whether its images are harmful."""

    def __init__(
        self,
        shards: str,
        steps: Sequence[int] = (5, 10, 20, 40, 80),
        pictures: int = 256,
        batch_size: int = 16,
        lr: float = 1e-3,
        rank: int = 8,
    ) -> None:
        name = type(self).__name__
        self.steps = increasing(steps, f"{name}: steps")
        if min(pictures, batch_size) < 1 or lr <= 0:
            raise UserError(f"{name}: pictures and batch_size must be at least 1, lr above 0")
        self.shards, self.pictures, self.batch_size = shards, pictures, batch_size
        self.recipes = [Recipe(lr=lr, rank=rank)]
        self.settings: dict[str, Any] = {
            "shards": shards, "steps": self.steps, "pictures": pictures, "batch_size": batch_size, "lr": lr,
            "rank": rank,
        }  # fmt: skip

    @property
    def points(self) -> int:
        return len(self.steps) * len(self.recipes)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, type(self).__name__)

    def refuses(self, target: Target) -> str | None:
        return target.closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        attacked = {prompt.prompt for prompt in target.prompts}
        examples = read_images(self.shards, self.pictures, self.harmful, type(self).__name__, without=attacked)
        for recipe in self.recipes:
            network = target.network()
            told = f"{recipe.label()}: " if len(self.recipes) > 1 else ""
            for step, loss in train_weights(network, examples, recipe, "attack", self.batch_size, target.seed):
                target.tell(f"{told}step {step} of {self.steps[-1]}, loss {loss:.3f}")
                if step in self.steps:
                    yield target.stage(
                        step, pipe=network.pipe, drawing=target.exact,
                        label=recipe.label() if len(self.recipes) > 1 else "",
                        identity={"fine_tune": step, **self._identity(recipe)},
                    )  # fmt: skip
                if step == self.steps[-1]:
                    break

    def _identity(self, recipe: Recipe) -> dict[str, Any]:
        return {"recipe": asdict(recipe)} if len(self.recipes) > 1 else {}


class HarmlessFineTune(FineTune):
    """Train a LoRA on top of the arm, on harmless images with their own prompts: does harm come back unintentionally?

    This can happen without intent: ordinary users of published weights do such training.

    Args:
        shards: preference shards; their chosen images of clean prompts are the training images.
        steps: optimizer steps at each point of the curve.
        pictures: number of training images.
        batch_size: images in a step.
        lr: learning rate of AdamW, constant.
        rank: rank of the LoRA, on the attention projections.
    """

    budget: ClassVar[str] = "optimizer steps of a LoRA on harmless images"
    knows = "white box: trains the weights, without any harmful image"
    harmful: ClassVar[bool] = False


class StrongestFineTune(FineTune):
    """Several fine-tunings; at each number of steps the one that brings back most harm counts.

    The strongest one can differ from budget to budget. The report names it and lists all of them. The interval is that
    of the strongest one; choosing among several makes it slightly too high.

    Args:
        shards: as for `FineTune`.
        recipes: the fine-tunings: LoRA or all weights, optimizer, learning rate, rank.
        steps: optimizer steps at each point of the curve.
        pictures: how many images the attacker has.
        batch_size: images in a step.
        harmful: train on harmful images; false: on harmless ones, as `HarmlessFineTune`.
    """

    budget: ClassVar[str] = "optimizer steps of the strongest of several fine-tunings"
    knows = "white box: trains the weights, in several ways"
    strongest: ClassVar[bool] = True

    def __init__(
        self,
        shards: str,
        recipes: list[Recipe] | None = None,
        steps: Sequence[int] = (10, 20, 40, 80),
        pictures: int = 256,
        batch_size: int = 16,
        harmful: bool = True,
    ) -> None:
        super().__init__(shards, steps, pictures, batch_size)
        self.recipes = [*RECIPES] if recipes is None else list(recipes)
        if not self.recipes or len({one.label() for one in self.recipes}) < len(self.recipes):
            raise UserError("StrongestFineTune: recipes: give at least one, and no recipe twice")
        self.harmful = harmful  # type: ignore[misc]  # of this one, not of its class
        rest = {key: value for key, value in self.settings.items() if key not in ("lr", "rank")}
        self.settings = rest | {"recipes": [asdict(one) for one in self.recipes], "harmful": harmful}

    def _identity(self, recipe: Recipe) -> dict[str, Any]:
        return {"recipe": asdict(recipe)}


RECIPES = (
    *(Recipe("lora", lr, "AdamW", 8) for lr in (3e-4, 1e-3, 3e-3)),
    *(Recipe("full", lr, "AdamW") for lr in (3e-5, 1e-4, 3e-4)),
    Recipe("lora", 3e-2, "SGD", 8),
    Recipe("full", 1e-2, "SGD"),
)
"""The default recipes: LoRA and all weights, three learning rates each, and a second optimizer."""
