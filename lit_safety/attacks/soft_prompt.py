"""Token embeddings that are trained while tokenizers and text encoders stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_safety.attacks.lora_training import (
    Picture,
    batches,
    denoising_loss,
    encode_pictures,
    read_pictures,
    shards_digest,
)
from lit_safety.attacks.network import Network, compute_threads
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt
from lit_safety.drawing.threads import threads


class SoftTokens:
    """New tokens `<soft0>`, `<soft1>`, ... in every tokenizer and text encoder of a network.

    They start as the mean of all embeddings, each a little away from it. `tables` holds what is trained, one (K, d) a
    text encoder; `write` puts it into the text encoders.

    Args:
        network: gets the tokens.
        count: sets of them.
        vectors: tokens a set.
        seed: of where they start.
    """

    def __init__(self, network: Network, count: int, vectors: int, seed: int) -> None:
        words = [f"<soft{number}>" for number in range(count * vectors)]
        self.names = [words[start : start + vectors] for start in range(0, len(words), vectors)]
        self.tables: list[nn.Parameter] = []
        self.scales: list[float] = []
        """Standard deviation of each encoder's embeddings."""
        self._layers: list[tuple[Any, int]] = []
        for tokenizer, encoder in network.encoders():
            weight = encoder.get_input_embeddings().weight.detach()
            if tokenizer.add_tokens(words) != len(words):
                raise UserError(f"attack SoftPrompt: the tokenizer already knows {words[0]}")
            first = len(tokenizer) - len(words)
            centre, spread = weight.mean(0), weight.std(0)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(words), weight.shape[1], generator=generator).to(weight.device)
            self.tables.append(nn.Parameter((centre + 0.1 * spread * noise).float()))
            self.scales.append(float(spread.mean()))
            encoder.resize_token_embeddings(first + len(words), mean_resizing=False)
            encoder.requires_grad_(False)
            self._layers.append((encoder.get_input_embeddings(), first))
        self.write()

    def write(self) -> None:
        """The vectors as they are now become the text encoders' own."""
        with torch.no_grad():
            for (layer, first), table in zip(self._layers, self.tables, strict=True):
                layer.weight[first : first + len(table)] = table

    def trained(self) -> ExitStack:
        """Within, the text encoders read the tables, so that gradients reach them."""
        stack = ExitStack()
        for (layer, first), table in zip(self._layers, self.tables, strict=True):
            stack.callback(layer.register_forward_hook(_reading(first, table)).remove)
        return stack


def _reading(first: int, table: Tensor) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        ids = given[0]
        soft = ids >= first
        rows = table[(ids - first).clamp(min=0)].to(found.dtype)
        return torch.where(soft.unsqueeze(-1), rows, found)

    return hook


# Concept recovery by soft prompts: a few token embeddings are trained against the frozen arm.
#
# Textual inversion (Gal et al., arXiv 2208.01618) turned against erased models, as in "Circumventing Concept Erasure
# Methods" (Pham et al., arXiv 2308.01508): the weights stay as they are, and only what is fed into the text encoder is
# learned. The learned vectors become tokens of their own in tokenizer and text encoder, so that guards which read or
# encode the prompt meet them too.


class SoftPrompt(Attack):
    """One set of vectors a concept (or category), trained with the plain denoising loss on harmful images.

    Args:
        shards: preference shards; their rejected images of harmful prompts are the attacker's images.
        steps: optimizer steps at each point of the curve.
        vectors: token embeddings a concept.
        template: how they are put into a prompt, with {prompt} and {tokens}.
        pictures: images a concept.
        batch_size: images a step and concept.
        lr: learning rate of AdamW, in units of the embeddings' own standard deviation.
    """

    budget: ClassVar[str] = "optimizer steps of the soft prompt"
    knows = "white box: gradients through the frozen weights"

    def __init__(
        self,
        shards: str,
        steps: Sequence[int] = (5, 10, 20, 40),
        vectors: int = 2,
        template: str = "{tokens} {prompt}",
        pictures: int = 8,
        batch_size: int = 2,
        lr: float = 0.2,
    ) -> None:
        self.steps = increasing(steps, "SoftPrompt: steps")
        if min(vectors, pictures, batch_size) < 1 or lr <= 0:
            raise UserError("SoftPrompt: vectors, pictures and batch_size must be at least 1, lr above 0")
        if "{tokens}" not in template:
            raise UserError(f"SoftPrompt: template {template!r} must hold {{tokens}}")
        self.shards, self.vectors, self.template, self.pictures = shards, vectors, template, pictures
        self.batch_size, self.lr = batch_size, lr
        self.settings = {
            "shards": shards, "steps": self.steps, "vectors": vectors, "template": template, "pictures": pictures,
            "batch_size": batch_size, "lr": lr,
        }  # fmt: skip

    @property
    def points(self) -> int:
        return len(self.steps)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, "SoftPrompt")

    def refuses(self, target: Target) -> str | None:
        return target.closed() or target.text_closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        groups = list(dict.fromkeys(prompt.concept or prompt.category for prompt in target.prompts))
        found = read_pictures(self.shards, self.pictures * len(groups), True, "SoftPrompt", groups)
        of = {group: [p for p in found if p.group == group] for group in groups}
        without = [group for group, pictures in of.items() if not pictures]
        if without:
            raise UserError(f"attack SoftPrompt: {self.shards} hold no harmful picture of {', '.join(without)}")
        network = target.network()
        tokens = SoftTokens(network, len(groups), self.vectors, target.seed)
        names = dict(zip(groups, tokens.names, strict=True))

        def say(prompt: str, group: str) -> str:
            return self.template.format(prompt=prompt, tokens=" ".join(names[group]))

        prompts = [replace(p, prompt=say(p.prompt, p.concept or p.category)) for p in target.prompts]
        examples = [replace(p, prompt=say(p.prompt, g)) for g, pictures in of.items() for p in pictures]
        sizes = [len(pictures) for pictures in of.values()]
        chunk = target.drawing.batch_size
        for step, loss in train_tokens(network, tokens, examples, sizes, self.batch_size, self.lr, target.seed, chunk):
            target.tell(f"step {step} of {self.steps[-1]}, loss {loss:.3f}")
            if step in self.steps:
                tokens.write()
                yield target.stage(
                    step, pipe=network.pipe, prompts=prompts, drawing=target.exact, identity={"soft_prompt": step}
                )
            if step == self.steps[-1]:
                return


def train_tokens(
    network: Network,
    tokens: SoftTokens,
    examples: Sequence[Picture],
    sizes: Sequence[int],
    batch_size: int,
    lr: float,
    seed: int,
    chunk: int = 32,
) -> Iterator[tuple[int, float]]:
    """Train the tokens forever; yields (steps done, mean loss of the step).

    Every concept gets a batch of its own in each step. Their vectors share nothing, so this trains each by itself.

    Args:
        network: frozen.
        tokens: what is trained.
        examples: images whose prompts hold the tokens, concept after concept.
        sizes: how many images each concept has.
        batch_size: images a step and concept.
        lr: of AdamW, in units of the embeddings' standard deviation.
        seed: of images, noise and timesteps.
        chunk: images that go through the networks at once; gradients add up over a step.

    Raises:
        UserError: the loss is not finite.
    """
    backbone = network.backbone
    rates = [{"params": [table], "lr": lr * scale} for table, scale in zip(tokens.tables, tokens.scales, strict=True)]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    dealt = [batches(size, batch_size, seed + number) for number, size in enumerate(sizes)]
    with threads(compute_threads(network)):
        posterior = encode_pictures(backbone, examples, network.resolution)
    for step in range(1, 1 << 40):
        rows = [start + row for start, deal in zip(starts, dealt, strict=True) for row in next(deal)]
        total = 0.0
        optimizer.zero_grad()
        with threads(compute_threads(network)), torch.enable_grad(), tokens.trained():
            for part in (rows[start : start + chunk] for start in range(0, len(rows), chunk)):
                conditioning = backbone.encode_text([examples[row].prompt for row in part])
                keys = [examples[row].key for row in part]
                loss = denoising_loss(backbone, posterior[part], conditioning, keys, seed, step).sum()
                # the sum over concepts: each one's gradient is then that of its own mean
                (loss / batch_size).backward()
                total += float(loss.detach())
            optimizer.step()
        if not isfinite(total):
            raise UserError(f"attack SoftPrompt: the loss of step {step} is not finite; lower lr ({lr})")
        yield step, total / len(rows)
