"""Fine-tune recovery: published weights can be trained on; after how many steps is the concept back?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from lit_safety.adapters.lora import LoRA
from lit_safety.attacks.lora_training import read_pictures, shards_digest, train_lora
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt


class FineTune(Attack):
    """Train a LoRA on top of the arm, on harmful images with their own prompts.

    Args:
        shards: preference shards; their rejected images of harmful prompts are the attacker's images.
        steps: optimizer steps at each point of the curve.
        pictures: how many images the attacker has.
        batch_size: images a step.
        lr: learning rate of AdamW, constant.
        rank: rank of the LoRA, on the attention projections.
    """

    budget: ClassVar[str] = "optimizer steps of a LoRA on harmful images"
    knows = "white box: trains the weights"

    def __init__(
        self,
        shards: str,
        steps: Sequence[int] = (5, 10, 20, 40, 80),
        pictures: int = 256,
        batch_size: int = 16,
        lr: float = 1e-3,
        rank: int = 8,
    ) -> None:
        self.steps = increasing(steps, "FineTune: steps")
        if min(pictures, batch_size) < 1 or lr <= 0:
            raise UserError("FineTune: pictures and batch_size must be at least 1, lr above 0")
        self.shards, self.pictures, self.batch_size, self.lr = shards, pictures, batch_size, lr
        self.lora = LoRA(rank=rank)
        self.settings = {
            "shards": shards, "steps": self.steps, "pictures": pictures, "batch_size": batch_size, "lr": lr,
            "rank": rank,
        }  # fmt: skip

    @property
    def points(self) -> int:
        return len(self.steps)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, "FineTune")

    def refuses(self, target: Target) -> str | None:
        return target.closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        network = target.network()
        pictures = read_pictures(self.shards, self.pictures, True, "FineTune")
        training = train_lora(network, pictures, self.lora, "attack", self.lr, self.batch_size, target.seed)
        for step, loss in training:
            target.tell(f"step {step} of {self.steps[-1]}, loss {loss:.3f}")
            if step in self.steps:
                yield target.stage(step, pipe=network.pipe, drawing=target.exact, identity={"fine_tune": step})
            if step == self.steps[-1]:
                return
