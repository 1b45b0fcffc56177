"""The attacker's images, which are harmful (or harmless) examples from preference shards, and training on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_safety.adapters.lora import LoRA
from lit_safety.attacks.network import Network, compute_threads
from lit_safety.core.chance import LATENT, NOISE, normal, sample_seed, uniform
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.core.images import FORMATS, decode_image
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from lit_safety.data.reading.decode import to_tensor
from lit_safety.data.reading.source import Source, open_source
from lit_safety.drawing.threads import threads

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone, Conditioning
    from lit_safety.drawing.prompts import Prompt


@dataclass(frozen=True)
class TrainingImage:
    """One example."""

    key: str
    """Unique among the images."""
    prompt: str
    group: str
    """The concept that it shows, else its first category; empty for a harmless image."""
    image: Image.Image


def read_images(
    shards: str,
    count: int,
    harmful: bool,
    user: str,
    groups: Sequence[str] | None = None,
    without: Collection[str] = (),
) -> list[TrainingImage]:
    """Up to `count` images, taken from the concepts in turn, the same ones every time.

    Harmful images are rejected images of harmful prompts that are labelled harmful. Harmless images are chosen images
    of clean prompts that are labelled safe. Images without label are not used.

    Args:
        shards: a folder or pattern of shards with images.
        count: the largest number of images.
        harmful: whether to take harmful or harmless images.
        user: the attack that needs them, for messages.
        groups: take only these concepts (or categories).
        without: prompts whose images are left out, that is the attacked ones.

    Raises:
        UserError: the shards are missing or damaged, or hold no such image.
    """
    side = "rejected" if harmful else "chosen"
    source = open_source(shards, f"attack {user}: shards")
    found: dict[str, list[tuple[int, int]]] = {}
    for shard, index, metadata in _metadata(source):
        label = metadata.harmful.rejected if harmful else metadata.harmful.chosen
        if metadata.prompt_kind == ("harmful" if harmful else "clean") and label is harmful:
            group = metadata.concept or next(iter(metadata.categories), "") if harmful else ""
            if (groups is None or group in groups) and metadata.prompt not in without:
                found.setdefault(group, []).append((shard, index))
    chosen = _in_turn([rows for _, rows in sorted(found.items())], count)
    if not chosen:
        what = "rejected image labelled harmful of a harmful prompt" if harmful else "safe chosen image"
        raise UserError(f"attack {user}: {shards} hold no {what}; give others")
    return [example for shard in sorted({s for s, _ in chosen}) for example in _read(source, shard, chosen, side)]


def image_of_each(shards: str, prompts: Sequence[Prompt], user: str) -> list[TrainingImage]:
    """A harmful image of each prompt's concept (or category); several prompts of a concept get different ones in turn.

    Images of these prompts themselves are left out.

    Raises:
        UserError: as `read_images`, or there is no image of a concept.
    """
    groups = [prompt.concept or prompt.category for prompt in prompts]
    found = read_images(shards, len(prompts) * len(set(groups)), True, user, groups, {p.prompt for p in prompts})
    of: dict[str, list[TrainingImage]] = {}
    for example in found:
        of.setdefault(example.group, []).append(example)
    if missing := [group for group in dict.fromkeys(groups) if group not in of]:
        raise UserError(f"attack {user}: {shards} hold no harmful image of {', '.join(missing)}")
    met: dict[str, int] = {}
    chosen = []
    for group in groups:
        met[group] = met.get(group, -1) + 1
        chosen.append(of[group][met[group] % len(of[group])])
    return chosen


def shards_digest(shards: str, user: str) -> str:
    """A hash of the shards' sizes and contents for the report, which does not depend on where they are.

    Raises:
        UserError: there are no shards.
    """
    return digest(open_source(shards, f"attack {user}: shards").identity())


def _metadata(source: Source) -> Iterator[tuple[int, int, PairMetadata]]:
    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        try:
            if shard.problem is not None:
                raise UserError(f"{shard.path}: {shard.problem}")
            for index in range(len(shard.index.samples)):
                yield number, index, parse_metadata(shard.read_member(index, "json"), shard.where(index))
        finally:
            shard.close()


def _in_turn(rows: list[list[tuple[int, int]]], count: int) -> set[tuple[int, int]]:
    """The first of each row, then the second of each row, and so on."""
    taken: list[tuple[int, int]] = []
    for turn in range(max(map(len, rows), default=0)):
        taken += [row[turn] for row in rows if turn < len(row)]
        if len(taken) >= count:
            break
    return set(taken[:count])


def _read(source: Source, number: int, chosen: set[tuple[int, int]], side: str) -> Iterator[TrainingImage]:
    shard = source.open_shard(number)
    try:
        for index in sorted(p for s, p in chosen if s == number):
            where = shard.where(index)
            key, members = shard.read(index, lambda name: name == "json" or name.startswith(f"{side}."))
            names = [name for name in members if name.startswith(f"{side}.") and name.split(".", 1)[1] in FORMATS]
            if not names:
                raise UserError(f"{where}: has no {side} image (only a cache of it?); give shards with images")
            metadata = parse_metadata(members["json"], where)
            group = metadata.concept or next(iter(metadata.categories), "")
            image = decode_image(members[names[0]], f"{where}: {side}")
            yield TrainingImage(f"{number}/{key}", metadata.prompt, group if side == "rejected" else "", image)
    finally:
        shard.close()


@torch.no_grad()
def encode_images(backbone: Backbone, examples: Sequence[TrainingImage], side: int, batch_size: int = 16) -> Tensor:
    """Posterior of each image's latents (N, 2, C, h, w); images are cropped to a square and scaled to `side` pixels."""
    rows = []
    for start in range(0, len(examples), batch_size):
        part = [
            to_tensor(ImageOps.fit(p.image, (side, side), Image.Resampling.LANCZOS) if p.image.size != (side, side)
                      else p.image)
            for p in examples[start : start + batch_size]
        ]  # fmt: skip
        rows.append(backbone.posterior(torch.stack(part).to(backbone.device)))
    return torch.cat(rows)


# The plain denoising loss that attackers train with. Every random number is a function of seed, step and image.


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers; each pass over the rows has its own order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def denoising_loss(
    backbone: Backbone, posterior: Tensor, conditioning: Conditioning, keys: Sequence[str], seed: int, step: int
) -> Tensor:
    """Mean squared error of the denoiser's prediction for each image (B,), fp32.

    Args:
        backbone: the model.
        posterior: posterior of the images' latents (B, 2, C, h, w).
        conditioning: conditioning of B rows.
        keys: the B images' names.
        seed: the attack's seed.
        step: number of the step; with seed and name it decides noise and timestep.
    """
    seeds = [sample_seed(seed, step, key) for key in keys]
    shape = tuple(posterior.shape[2:])
    noise, spread = (normal(seeds, purpose, shape).to(posterior.device) for purpose in (NOISE, LATENT))
    fractions = torch.tensor([uniform(s, "timestep") for s in seeds], dtype=torch.float64)
    timesteps = backbone.timesteps(fractions, (shape[-2], shape[-1])).to(posterior.device)
    latents = backbone.latents(posterior, spread)
    noisy = backbone.add_noise(latents, noise, timesteps)
    target = backbone.target(latents, noise, timesteps)
    return (backbone.predict(noisy, timesteps, conditioning).float() - target.float()).pow(2).flatten(1).mean(1)


# A few steps of ordinary fine-tuning on images and their prompts, of a LoRA or of all weights.


@dataclass(frozen=True)
class Recipe:
    """One way of fine-tuning.

    Raises:
        UserError: a number is outside its range, or torch has no such optimizer.
    """

    weights: Literal["lora", "full"] = "lora"
    """A LoRA on the layers of the model's family, or every weight of the denoiser."""
    lr: float = 1e-3
    """Learning rate, constant."""
    optimizer: str = "AdamW"
    """Class name in torch.optim, with its own defaults; SGD has a momentum of 0.9."""
    rank: int = 8
    """Rank of the LoRA."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf") or self.rank < 1:
            raise UserError(f"fine-tuning: lr {self.lr}, rank {self.rank}: lr must be above 0 and rank at least 1")
        kind = getattr(torch.optim, self.optimizer, None)
        if self.optimizer in ("Optimizer", "LBFGS", "SparseAdam") or not isinstance(kind, type):
            raise UserError(
                f"fine-tuning: optimizer {self.optimizer}: torch.optim has no such optimizer with plain steps; use for "
                "example AdamW, SGD, RMSprop or Adagrad"
            )

    def label(self) -> str:
        """Such as `LoRA of rank 8, AdamW, rate 0.001`."""
        what = f"LoRA of rank {self.rank}" if self.weights == "lora" else "all weights"
        return f"{what}, {self.optimizer}, rate {self.lr:g}"

    def parameters(self, network: Network, name: str, seed: int, lora: LoRA | None = None) -> list[torch.nn.Parameter]:
        """The parameters to train, on the network's device; a LoRA is called `name` and has the recipe's rank."""
        backbone = network.backbone
        if self.weights == "full":
            parameters = list(backbone.denoiser.requires_grad_(True).parameters())
        else:
            lora = lora or LoRA(rank=self.rank)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # because PEFT draws the initial A from the global generator
                parameters = lora.with_targets(backbone.lora_targets()).attach(backbone.denoiser, name)
        for parameter in parameters:
            parameter.data = parameter.data.to(backbone.device)
        return parameters


def train_lora(
    network: Network, examples: Sequence[TrainingImage], lora: LoRA, name: str, lr: float, batch_size: int, seed: int
) -> Iterator[tuple[int, float]]:
    """Train an adapter called `name` on the network without end; yields (steps done, loss) after each step.

    AdamW with a constant rate, as `train_weights`. The network's own weights, including fused adapters, do not change.
    """
    return train_weights(network, examples, Recipe("lora", lr, "AdamW", lora.rank), name, batch_size, seed, lora)


def train_weights(
    network: Network,
    examples: Sequence[TrainingImage],
    recipe: Recipe,
    name: str,
    batch_size: int,
    seed: int,
    lora: LoRA | None = None,
) -> Iterator[tuple[int, float]]:
    """Train by a recipe without end; yields (steps done, loss) after each step.

    It uses the plain denoising loss, each image with its own prompt, and clips gradients to norm 1.

    Raises:
        UserError: the loss is not finite.
    """
    backbone = network.backbone
    parameters = recipe.parameters(network, name, seed, lora)
    more: dict[str, Any] = {"momentum": 0.9} if recipe.optimizer == "SGD" else {}
    optimizer = getattr(torch.optim, recipe.optimizer)(parameters, lr=recipe.lr, **more)
    posterior: Tensor | None = None
    for step, rows in enumerate(batches(len(examples), batch_size, seed), 1):
        with threads(compute_threads(network)), torch.enable_grad():
            if posterior is None:
                posterior = encode_images(backbone, examples, network.resolution)
            with torch.no_grad():
                conditioning = backbone.encode_text([examples[row].prompt for row in rows])
            keys = [examples[row].key for row in rows]
            loss = denoising_loss(backbone, posterior[rows], conditioning, keys, seed, step).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if not torch.isfinite(loss):
            raise UserError(f"fine-tuning: the loss of step {step} is not finite; lower lr ({recipe.lr})")
        yield step, float(loss.detach())
