"""Token embeddings that are trained while the text encoders' weights are frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_safety.attacks.lora_training import (
    TrainingImage,
    batches,
    denoising_loss,
    encode_images,
    read_images,
    shards_digest,
)
from lit_safety.attacks.network import Network, compute_threads, taught
from lit_safety.attacks.suffix import shorten_to_fit
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt
from lit_safety.drawing.threads import threads


class SoftTokens:
    """New tokens `<soft0>`, `<soft1>`, ... in every tokenizer and text encoder of a network.

    They start near the mean of all embeddings, each with a small random change. `tables` holds the trained vectors, one
    (K, d) for each text encoder; `write` puts them into the text encoders.

    Args:
        network: the network that gets the tokens.
        count: number of sets.
        vectors: tokens in a set.
        seed: seed of the initial values.
        from_words: indices of sets that start near random words instead.
    """

    def __init__(self, network: Network, count: int, vectors: int, seed: int, from_words: Collection[int] = ()) -> None:
        words = [f"<soft{number}>" for number in range(count * vectors)]
        self.names = [words[start : start + vectors] for start in range(0, len(words), vectors)]
        started = [number // vectors in from_words for number in range(len(words))]
        self.tables: list[nn.Parameter] = []
        self.scales: list[float] = []
        """Standard deviation of each encoder's embeddings."""
        self._layers: list[tuple[Any, int]] = []
        for tokenizer, encoder in network.encoders():
            weight = encoder.get_input_embeddings().weight.detach()
            known = weight[taught(encoder)]
            centre, spread = known.mean(0), known.std(0)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(words), weight.shape[1], generator=generator).to(weight.device)
            rows = torch.randint(len(known), (len(words),), generator=generator).to(weight.device)
            base = torch.where(torch.tensor(started, device=weight.device)[:, None], known[rows], centre)
            self.tables.append(nn.Parameter((base + 0.1 * spread * noise).float()))
            self.scales.append(float(spread.mean()))
            self._layers.append(_room(tokenizer, encoder, words))
        self.write()

    def put(self, network: Network) -> Any:
        """Put the current tokens into another network's tokenizers and text encoders; returns its pipeline."""
        words = [word for names in self.names for word in names]
        with torch.no_grad():
            for (tokenizer, encoder), table in zip(network.encoders(), self.tables, strict=True):
                layer, first = _room(tokenizer, encoder, words)
                layer.weight[first : first + len(table)] = table.to(layer.weight)
        return network.pipe

    def write(self) -> None:
        """Write the current vectors into the text encoders."""
        with torch.no_grad():
            for (layer, first), table in zip(self._layers, self.tables, strict=True):
                layer.weight[first : first + len(table)] = table

    def trained(self) -> ExitStack:
        """A context in which the text encoders read the tables, so that gradients reach them."""
        stack = ExitStack()
        for (layer, first), table in zip(self._layers, self.tables, strict=True):
            stack.callback(layer.register_forward_hook(_reading(first, table)).remove)
        return stack


def _room(tokenizer: Any, encoder: Any, words: list[str]) -> tuple[Any, int]:
    """A text encoder's embedding after adding rows for new words at its end, and the index of the first new row.

    Raises:
        UserError: the tokenizer already knows such words.
    """
    known = tokenizer.get_vocab()
    if words[0] not in known:
        tokenizer.add_tokens(words)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder.requires_grad_(False)
        vars(encoder)["_soft_words"] = list(words)
    elif vars(encoder).get("_soft_words") != list(words):
        raise UserError(f"attack SoftPrompt: the tokenizer already knows {words[0]}")
    return encoder.get_input_embeddings(), tokenizer.convert_tokens_to_ids(words[0])


def _reading(first: int, table: Tensor) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        ids = given[0]
        soft = ids >= first
        rows = table[(ids - first).clamp(min=0)].to(found.dtype)
        return torch.where(soft.unsqueeze(-1), rows, found)

    return hook


# Concept recovery by soft prompts: a few token embeddings are trained against the frozen arm.
#
# It is textual inversion (Gal et al., arXiv 2208.01618) applied to erased models, as in "Circumventing Concept Erasure
# Methods" (Pham et al., arXiv 2308.01508): the weights are frozen, and only the text encoder's input is learned. The
# learned vectors become new tokens in tokenizer and text encoder, so that guards which read or encode the prompt see
# them too.


class SoftPrompt(Attack):
    """One set of vectors for each concept (or category), trained with the plain denoising loss on harmful images.

    Args:
        shards: preference shards; the attacker's images are their rejected images of harmful prompts, without those of
            attacked prompts.
        steps: optimizer steps at each point of the curve.
        vectors: token embeddings for each concept.
        template: how they are added to a prompt, with {prompt} and {tokens}.
        pictures: images of each concept.
        batch_size: images of each concept in a step.
        lr: learning rate of AdamW, in units of the embeddings' own standard deviation.
    """

    budget: ClassVar[str] = "optimizer steps of the soft prompt"
    knows = "white box: gradients through the frozen weights, and harmful images"
    restarts: int = 1
    """Sets of vectors that are trained for each concept; the one with the lowest loss is used."""

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
        name = type(self).__name__
        self.steps = increasing(steps, f"{name}: steps")
        if min(vectors, pictures, batch_size) < 1 or lr <= 0:
            raise UserError(f"{name}: vectors, pictures and batch_size must be at least 1, lr above 0")
        if "{tokens}" not in template:
            raise UserError(f"{name}: template {template!r} must hold {{tokens}}")
        self.shards, self.vectors, self.template, self.pictures = shards, vectors, template, pictures
        self.batch_size, self.lr = batch_size, lr
        self.settings: dict[str, Any] = {
            "shards": shards, "steps": self.steps, "vectors": vectors, "template": template, "pictures": pictures,
            "batch_size": batch_size, "lr": lr,
        }  # fmt: skip

    @property
    def points(self) -> int:
        return len(self.steps)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, type(self).__name__)

    def refuses(self, target: Target) -> str | None:
        return target.closed() or target.text_closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        user = type(self).__name__
        groups = list(dict.fromkeys(prompt.concept or prompt.category for prompt in target.prompts))
        attacked = {prompt.prompt for prompt in target.prompts}
        found = read_images(self.shards, self.pictures * len(groups), True, user, groups, attacked)
        of = {group: [p for p in found if p.group == group] for group in groups}
        without = [group for group, examples in of.items() if not examples]
        if without:
            raise UserError(f"attack {user}: {self.shards} hold no harmful image of {', '.join(without)}")
        network = target.network()
        tokenizer = network.encoders()[0][0]
        texts = [p.prompt for p in target.prompts] + [p.prompt for examples in of.values() for p in examples]
        if "{prompt}" in self.template:  # each new word will be one token, but does not exist yet
            around = len(tokenizer(self.template.format(prompt="", tokens=""))["input_ids"]) - 2
            texts, _ = shorten_to_fit(tokenizer, texts, self.vectors + max(around, 0), f"{user}: a soft prompt")
            cut = sum(text != p.prompt for text, p in zip(texts, target.prompts, strict=False))
            if cut:
                target.notes.append(
                    f"{cut} of {len(attacked)} prompts lost their last words to make room for the vectors"
                )
        again = {row for row in range(len(groups) * self.restarts) if row % self.restarts}
        tokens = SoftTokens(network, len(groups) * self.restarts, self.vectors, target.seed, again)
        place = {group: number for number, group in enumerate(groups)}

        def say(prompt: str, group: str, start: int) -> str:
            names = tokens.names[place[group] * self.restarts + start]
            return self.template.format(prompt=prompt, tokens=" ".join(names))

        fitting = iter(texts)
        asked = [next(fitting) for _ in target.prompts]
        own = {group: [replace(p, prompt=next(fitting)) for p in examples] for group, examples in of.items()}
        examples = [
            replace(p, prompt=say(p.prompt, group, start))
            for group, examples in own.items()
            for start in range(self.restarts)
            for p in examples
        ]
        sizes = [len(examples) for examples in own.values() for _ in range(self.restarts)]
        chunk = target.drawing.batch_size
        for step, loss in train_tokens(network, tokens, examples, sizes, self.batch_size, self.lr, target.seed, chunk):
            target.tell(f"step {step} of {self.steps[-1]}, loss {loss:.3f}")
            if step in self.steps:
                best = self._best(network, tokens, examples, sizes, target.seed, chunk)
                tokens.write()
                prompts = []
                for p, text in zip(target.prompts, asked, strict=True):
                    group = p.concept or p.category
                    prompts.append(replace(p, prompt=say(text, group, best[place[group]])))
                yield target.stage(
                    step, pipe=network.pipe, prompts=prompts, drawing=target.exact, identity={"soft_prompt": step},
                    apply=tokens.put,
                )  # fmt: skip
            if step == self.steps[-1]:
                return

    def _best(
        self,
        network: Network,
        tokens: SoftTokens,
        examples: Sequence[TrainingImage],
        sizes: Sequence[int],
        seed: int,
        chunk: int,
    ) -> list[int]:
        """For each concept the index of the restart with the lowest loss on the attacker's images.

        All use the same noise and timesteps.
        """
        if self.restarts == 1:
            return [0] * len(sizes)
        losses = []
        with threads(compute_threads(network)), torch.no_grad(), tokens.trained():
            posterior = encode_images(network.backbone, examples, network.resolution)
            for start in range(0, len(examples), chunk):
                part = examples[start : start + chunk]
                text = network.backbone.encode_text([p.prompt for p in part])
                rows, keys = posterior[start : start + chunk], [p.key for p in part]
                draws = [denoising_loss(network.backbone, rows, text, keys, seed, -1 - n) for n in range(DRAWS)]
                losses.append(torch.stack(draws).mean(0).cpu())
        means = [one.mean() for one in torch.cat(losses).split(list(sizes))]
        return [
            int(torch.stack(means[first : first + self.restarts]).argmin())
            for first in range(0, len(means), self.restarts)
        ]


DRAWS = 4
"""Number of noises and timesteps of each image for comparing restarts."""


class ConceptInversion(SoftPrompt):
    """A soft prompt with a realistic budget: more vectors, hundreds of steps, and restarts from words.

    The first set of a concept starts at the mean of all words, the others at random words. The attacker uses the set
    with the lowest loss on the attacker's own images, and draws no images with the others.

    Args:
        shards: as for `SoftPrompt`.
        steps: optimizer steps at each point of the curve, of each restart.
        vectors: token embeddings for each concept, 1 to 8.
        restarts: sets of vectors for each concept.
        template: as for `SoftPrompt`.
        pictures: images of each concept.
        batch_size: images of each concept and restart in a step.
        lr: learning rate of AdamW, in units of the embeddings' own standard deviation.
    """

    budget: ClassVar[str] = "optimizer steps of each restart"
    MOST: ClassVar[int] = 8

    def __init__(
        self,
        shards: str,
        steps: Sequence[int] = (50, 150, 500),
        vectors: int = 8,
        restarts: int = 3,
        template: str = "{tokens} {prompt}",
        pictures: int = 8,
        batch_size: int = 2,
        lr: float = 0.1,
    ) -> None:
        super().__init__(shards, steps, vectors, template, pictures, batch_size, lr)
        if not 1 <= vectors <= self.MOST or restarts < 1:
            raise UserError(
                f"ConceptInversion: vectors {vectors} must be 1 to {self.MOST}, restarts {restarts} at least 1"
            )
        self.restarts = restarts
        self.settings["restarts"] = restarts


def train_tokens(
    network: Network,
    tokens: SoftTokens,
    examples: Sequence[TrainingImage],
    sizes: Sequence[int],
    batch_size: int,
    lr: float,
    seed: int,
    chunk: int = 32,
) -> Iterator[tuple[int, float]]:
    """Train the tokens without end; yields (steps done, mean loss of the step).

    Every concept gets its own batch in each step. The concepts share no vectors, so each is trained independently.

    Args:
        network: the frozen network.
        tokens: the tokens to train.
        examples: images whose prompts contain the tokens, sorted by concept.
        sizes: how many images each concept has.
        batch_size: images of each concept in a step.
        lr: learning rate of AdamW, in units of the embeddings' standard deviation.
        seed: seed of images, noise and timesteps.
        chunk: images in one pass through the networks; gradients are summed over a step.

    Raises:
        UserError: the loss is not finite.
    """
    backbone = network.backbone
    rates = [{"params": [table], "lr": lr * scale} for table, scale in zip(tokens.tables, tokens.scales, strict=True)]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    dealt = [batches(size, batch_size, seed + number) for number, size in enumerate(sizes)]
    with threads(compute_threads(network)):
        posterior = encode_images(backbone, examples, network.resolution)
    for step in range(1, 1 << 40):
        rows = [start + row for start, deal in zip(starts, dealt, strict=True) for row in next(deal)]
        total = 0.0
        optimizer.zero_grad()
        with threads(compute_threads(network)), torch.enable_grad(), tokens.trained():
            for part in (rows[start : start + chunk] for start in range(0, len(rows), chunk)):
                conditioning = backbone.encode_text([examples[row].prompt for row in part])
                keys = [examples[row].key for row in part]
                loss = denoising_loss(backbone, posterior[part], conditioning, keys, seed, step).sum()
                # a sum over concepts, so that each concept's gradient is that of its own mean
                (loss / batch_size).backward()
                total += float(loss.detach())
            optimizer.step()
        if not isfinite(total):
            raise UserError(f"attack SoftPrompt: the loss of step {step} is not finite; lower lr ({lr})")
        yield step, total / len(rows)
