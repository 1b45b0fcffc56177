"""Adversarial start images: image-to-image from an image that is optimised so that the aligned model draws harm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_safety.attacks.lora_training import encode_images, image_of_each, shards_digest
from lit_safety.attacks.network import Network, compute_threads
from lit_safety.attacks.similarity import text_rows
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.chance import NOISE, derive, normal, uniform
from lit_safety.core.errors import UserError
from lit_safety.drawing.edits import Edit, GivenImages
from lit_safety.drawing.prompts import Prompt
from lit_safety.drawing.threads import threads

if TYPE_CHECKING:
    from collections.abc import Collection

    from lit_safety.backbones.backbone import Conditioning


# After RECALL (ICLR 2026): the image is optimised against the aligned model itself, guided by one harmful reference
# image of the concept, and used together with the plain prompt. At the start it is noise mixed with a little of the
# reference. At noise levels that image-to-image uses, we minimise the error of the prediction for the noised start
# image with the prompt, where the clean image that the prediction should give is the reference:
#
#     x_t = A z(start) + B n,   n* = (x_t - A z(reference)) / B,   |f(x_t, t, prompt) - target(z(reference), n*, t)|^2
#
# by sign steps with momentum on the pixels, through the image encoder.


class StartImage(Attack):
    """Optimise one start image for each prompt, and redraw it with the prompt.

    Args:
        shards: preference shards; their rejected images of harmful prompts are the attacker's images, those of attacked
            prompts left out.
        steps: steps of the optimisation, at each point of the curve; the first point is the initial start image.
        strength: share of the noise schedule that is drawn again; 1 keeps nothing of the start image.
        reference: share of the harmful image in the initial start image; the rest is noise.
        lr: size of a step, where black to white is 2.
        momentum: weight of the earlier gradients.
    """

    budget: ClassVar[str] = "steps on the start image"
    knows = "white box: gradients through the aligned denoiser and image encoder, and a harmful image"
    origin: ClassVar[float | None] = None

    def __init__(
        self,
        shards: str,
        steps: Sequence[int] = (10, 40),
        strength: float = 0.8,
        reference: float = 0.25,
        lr: float = 0.03,
        momentum: float = 0.9,
    ) -> None:
        self.steps = increasing(steps, "StartImage: steps")
        if not 0 < strength <= 1 or not 0 <= reference <= 1 or lr <= 0 or not 0 <= momentum < 1:
            raise UserError(
                "StartImage: strength must be in (0, 1], reference in [0, 1], lr above 0 and momentum in [0, 1)"
            )
        self.shards, self.strength, self.reference, self.lr, self.momentum = shards, strength, reference, lr, momentum
        self.settings = {
            "shards": shards, "steps": self.steps, "strength": strength, "reference": reference, "lr": lr,
            "momentum": momentum,
        }  # fmt: skip

    @property
    def points(self) -> int:
        return len(self.steps) + 1

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, "StartImage")

    def refuses(self, target: Target) -> str | None:
        if (reason := target.closed()) is not None:
            return reason
        if int(target.drawing.steps * self.strength) < 1:
            raise UserError(
                f"attack StartImage: strength {self.strength} of {target.drawing.steps} steps is less than one step: "
                "nothing would be drawn; raise --steps or strength"
            )
        if type(target.pipe).__name__.startswith("Flux2"):
            return f"{type(target.pipe).__name__} takes reference images, but no start image with a strength"
        try:
            Edit("image_to_image", "", self.strength, "all").pipeline(target.pipe)
        except UserError as error:
            return str(error).removeprefix("--edit image_to_image: ")
        return None

    def stages(self, target: Target) -> Iterator[Stage]:
        examples = image_of_each(self.shards, target.prompts, "StartImage")
        network = target.network()
        backbone, side = network.backbone, network.resolution
        with threads(compute_threads(network)), torch.no_grad():
            posterior = encode_images(backbone, examples, side)
            goal = backbone.latents(posterior, torch.zeros_like(posterior[:, 0]))
            text = text_rows(network, [p.prompt for p in target.prompts])
        shown = [_pixels(p.image, side) for p in examples]
        seeds = [derive(p.seed, f"start image {target.seed}") for p in target.prompts]
        blank = normal(seeds, NOISE, (3, side, side)).mul(0.5)
        start = (self.reference * torch.stack(shown) + (1 - self.reference) * blank).clamp(-1, 1).to(backbone.device)
        search = _Search(self, network, goal, text, seeds, start, target.drawing.batch_size)
        for step in range(self.steps[-1] + 1):
            if step in (0, *self.steps):
                images = [_image(one) for one in search.images]
                given = {(p.prompt, p.seed): image for p, image in zip(target.prompts, images, strict=True)}
                edit = GivenImages(given, self.strength)
                yield target.stage(
                    step, pipe=edit.pipeline(network.pipe), drawing=replace(target.exact, edit=edit, resolution=None),
                    label="" if step else "the initial start image", identity={"start_image": step},
                    apply=lambda other, edit=edit: edit.pipeline(other.pipe),
                )  # fmt: skip
            if step < self.steps[-1]:
                loss = search.step(step)
                target.tell(f"step {step + 1} of {self.steps[-1]}, loss {loss:.3f}")


class _Search:
    """The start images of all prompts (P, 3, H, W) in [-1, 1], and the step that improves them."""

    def __init__(
        self,
        attack: StartImage,
        network: Network,
        goal: Tensor,
        text: Conditioning,
        seeds: Sequence[int],
        start: Tensor,
        chunk: int,
    ) -> None:
        self.attack, self.network, self.goal, self.text = attack, network, goal, text
        self.seeds, self.images, self.chunk = list(seeds), start, chunk
        self.moved = torch.zeros_like(start)

    def step(self, number: int) -> float:
        """One step on every image; returns the mean loss before it."""
        total = 0.0
        with threads(compute_threads(self.network)), torch.enable_grad():
            for first in range(0, len(self.images), self.chunk):
                rows = range(first, min(first + self.chunk, len(self.images)))
                pixels = self.images[rows.start : rows.stop].detach().requires_grad_(True)
                loss = self._loss(pixels, rows, number)
                gradient = torch.autograd.grad(loss.sum(), pixels)[0]
                gradient = gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
                moved = self.attack.momentum * self.moved[rows.start : rows.stop] + gradient
                self.moved[rows.start : rows.stop] = moved
                self.images[rows.start : rows.stop] = (pixels.detach() - self.attack.lr * moved.sign()).clamp(-1, 1)
                total += float(loss.detach().sum())
        return total / len(self.images)

    def _loss(self, pixels: Tensor, rows: Collection[int], number: int) -> Tensor:
        backbone = self.network.backbone
        part = slice(min(rows), max(rows) + 1)
        seeds = [derive(seed, f"start image, step {number}") for seed in self.seeds[part]]
        goal, text = self.goal[part], {name: one[part] for name, one in self.text.items()}
        noise = normal(seeds, NOISE, tuple(goal.shape[1:])).to(goal.device)
        # the noisier half of the levels that are drawn again: they decide what the image shows
        places = torch.tensor([self.attack.strength * (0.5 + 0.5 * uniform(s, "timestep")) for s in seeds])
        times = backbone.timesteps(places.double().clamp(max=0.999), (goal.shape[-2], goal.shape[-1])).to(goal.device)
        posterior = backbone.posterior(pixels)
        noisy = backbone.add_noise(backbone.latents(posterior, torch.zeros_like(goal)), noise, times)
        one, zero = torch.ones_like(goal), torch.zeros_like(goal)
        kept, added = backbone.add_noise(one, zero, times), backbone.add_noise(zero, one, times)
        implied = (noisy - kept * goal) / added
        wanted = backbone.target(goal, implied, times)
        return (backbone.predict(noisy, times, text).float() - wanted.float()).pow(2).flatten(1).mean(1)


def _pixels(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) in [-1, 1]."""
    from PIL import ImageOps

    from lit_safety.data.reading.decode import to_tensor

    same = image.size == (side, side)
    return to_tensor(image if same else ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def _image(pixels: Tensor) -> Image.Image:
    """An image with 8 bits for each channel, as an attacker would use it."""
    values = (pixels.float().cpu().permute(1, 2, 0).numpy() + 1) * 127.5
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
