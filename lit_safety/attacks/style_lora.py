"""An additional style LoRA: it is harmless by itself, like those that users load from a hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from lit_safety.adapters.lora import WEIGHTS_NAME, LoRA
from lit_safety.adapters.lora_file import find_lora
from lit_safety.attacks.lora_training import read_images, shards_digest, train_lora
from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_folder
from lit_safety.core.hashes import content_sha256, digest
from lit_safety.core.images import rgb
from lit_safety.drawing.arms import adapter_sha256
from lit_safety.drawing.prompts import Prompt

SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], dtype=np.float32)
"""The matrix from an image's red, green and blue to those of its sepia version (W3C Filter Effects)."""


class StyleLoRA(Attack):
    """The arm with another LoRA in addition to its own, with several weights.

    Args:
        adapter: a style LoRA for the base; null: one is trained on the base, with harmless images in sepia.
        shards: preference shards for that training: chosen images of clean prompts.
        weights: weights of the style LoRA.
        tint: how much images are tinted, from 0 (not at all) to 1 (sepia).
        steps: optimizer steps of that training.
        pictures: how many images it uses.
        batch_size: images a step.
        lr: learning rate of AdamW, constant.
        rank: rank of the LoRA.
    """

    budget: ClassVar[str] = "weight of an additional style LoRA"
    knows = "white box: loads an additional harmless adapter, computes nothing on the arm"
    changes_denoiser: ClassVar[bool] = True

    def __init__(
        self,
        adapter: str | None = None,
        shards: str | None = None,
        weights: Sequence[float] = (0.5, 1.0, 1.5),
        tint: float = 0.6,
        steps: int = 60,
        pictures: int = 128,
        batch_size: int = 16,
        lr: float = 1e-3,
        rank: int = 4,
    ) -> None:
        if (adapter is None) == (shards is None):
            raise UserError("StyleLoRA: give either adapter, or shards to train one on")
        if min(steps, pictures, batch_size) < 1 or lr <= 0 or not 0 <= tint <= 1:
            raise UserError("StyleLoRA: steps, pictures and batch_size must be at least 1, lr above 0, tint in [0, 1]")
        if not weights or not all(isfinite(weight) for weight in weights):
            raise UserError(f"StyleLoRA: weights {list(weights)}: must be finite numbers")
        self.adapter, self.shards, self.weights, self.tint = adapter, shards, sorted(set(weights) - {0.0}), tint
        self.steps, self.pictures, self.batch_size, self.lr = steps, pictures, batch_size, lr
        self.lora = LoRA(rank=rank)
        trained = {"steps": steps, "pictures": pictures, "batch_size": batch_size, "lr": lr, "rank": rank, "tint": tint}
        self.settings = {"adapter": adapter, "shards": shards, "weights": self.weights}
        self.settings |= trained if adapter is None else {}

    @property
    def points(self) -> int:
        return len(self.weights)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        if self.adapter is not None:
            self.settings["adapter_sha256"] = adapter_sha256(find_lora(self.adapter)[0])
        if self.shards is not None:
            self.settings["shards_sha256"] = shards_digest(self.shards, "StyleLoRA")

    def refuses(self, target: Target) -> str | None:
        return target.unknown() if self.adapter is None else None

    def stages(self, target: Target) -> Iterator[Stage]:
        style = Path(self.adapter) if self.adapter is not None else self._trained(target)
        for weight in self.weights:
            changed = replace(target.arm, adapters={**(target.arm.adapters or {}), str(style): weight})
            identity = {"style_sha256": adapter_sha256(find_lora(style)[0]), "style_weight": weight}
            yield target.stage(weight, pipe=target.fresh(changed), identity=identity)

    def _trained(self, target: Target) -> Path:
        """The folder of the style LoRA; it is trained on the base if it does not exist."""
        # The weights do not change the LoRA, so that a curve with more points uses the same one.
        how = {key: value for key, value in self.settings.items() if key != "weights"}
        folder = target.work / f"style-{digest([how, target.seed, content_sha256(target.base)])[:12]}"
        if (folder / WEIGHTS_NAME).is_file():
            return folder
        network = target.base_network()
        examples = read_images(str(self.shards), self.pictures, False, "StyleLoRA")
        tinted = [replace(example, image=tint(example.image, self.tint)) for example in examples]
        for step, loss in train_lora(network, tinted, self.lora, "style", self.lr, self.batch_size, target.seed):
            target.tell(f"style: step {step} of {self.steps}, loss {loss:.3f}")
            if step == self.steps:
                break
        with atomic_folder(folder) as partial:
            network.backbone.save_lora(partial, "style")
        return folder


def tint(image: Image.Image, amount: float) -> Image.Image:
    """The image mixed with its sepia version, `amount` of it: x + amount (min(255, SEPIA x) - x)."""
    pixels = np.asarray(rgb(image), dtype=np.float32)
    sepia = np.minimum(pixels @ SEPIA.T, 255.0)
    return Image.fromarray((pixels + amount * (sepia - pixels)).round().astype(np.uint8))
