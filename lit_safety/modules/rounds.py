"""What a round draws: prompts as they are, and, where a policy draws no safe image, prompts that are changed.

Learning from what a policy draws needs images that are better than others. A base that draws harm for nearly every
image of a harmful prompt has none, so some images of such a prompt are drawn in another way, which is recorded with
each. Everything here is a pure function of the prompts, the seed and the round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_safety.core.chance import derive, sample_seed
from lit_safety.core.errors import UserError
from lit_safety.data.reading.order import permutation
from lit_safety.drawing.guards.guard import Guard
from lit_safety.generation.words import Words, kept_share

if TYPE_CHECKING:
    from lit_safety.drawing.prompts import Prompt

#: An image of the prompt as it is, drawn by the sampling policy.
OWN = "own"
KEY = "model.init_args.explore.init_args"
_CHANGES: tuple[Literal["drop", "nearest"], ...] = ("drop", "nearest")


class Explore:
    """How images are drawn for a prompt of which the sampling policy has just drawn no safe image.

    The ways are tried in their order, each for the prompts that still have no safe image: an image of a prompt that was
    changed little is the better example. The frozen base draws them, so that what is learned is as good as the base.

    Args:
        ways: `drop`: without the words that no harmless prompt of the file has (or without a part of the prompt, at
            random, where that does not tell); `nearest`: the harmless prompt of the file that shares the most words.
        guards: guards of `lit_safety.guards`, each a way: the prompt as it is, with the guard on.
        guidance: other scales of guidance, each a way: the prompt as it is, with this scale.
        temperature: numbers that the initial noise is multiplied by, each a way: the prompt as it is, from the noise of
            the image that it is compared with, times this number. Far from 1 the base draws things that are no images,
            which a cost model may call safe. In (0, 2], other than 1.
        share: share of a prompt's images that may be explored, in (0, 1). Those before are of the prompt as it is.
        penalty: what an explored image loses of its quality where all words of its prompt were changed, in units of
            quality; of a part of the words that share. So of two safe images the one that is closer to its prompt is
            better.

    Raises:
        ValueError: there is no way, or a number is outside its range.
    """

    def __init__(
        self,
        ways: Sequence[Literal["drop", "nearest"]] = _CHANGES,
        guards: list[Guard] | None = None,
        guidance: list[float] | None = None,
        share: float = 0.5,
        penalty: float = 2.0,
        temperature: list[float] | None = None,
    ) -> None:
        if unknown := [way for way in ways if way not in _CHANGES]:
            raise ValueError(f"`{KEY}.ways` are drop and nearest, got {unknown[0]!r}")
        if not 0 < share < 1 or not 0 <= penalty < float("inf"):
            raise ValueError(f"`{KEY}`: share must lie in (0, 1) and penalty not be negative, got {share}, {penalty}")
        if not all(1 <= scale < float("inf") for scale in guidance or ()):
            raise ValueError(f"`{KEY}.guidance` are scales from 1 up, got {guidance}")
        if not all(0 < factor <= 2 and factor != 1 for factor in temperature or ()):
            raise ValueError(
                f"`{KEY}.temperature` are numbers above 0 and at most 2 that the initial noise is multiplied by, other "
                f"than 1, which is no other way; got {temperature}"
            )
        self.guards, self.share, self.penalty, self.ways = list(guards or ()), share, penalty, list(ways)
        self.guidance = {f"guidance {_number(scale)}": float(scale) for scale in guidance or ()}
        self.temperature = {f"temperature {_number(factor)}": float(factor) for factor in temperature or ()}
        """The scales of guidance and the factors of noise by their ways."""
        self.names = [
            *self.ways,
            *(f"guard {number}" for number in range(len(self.guards))),
            *self.guidance,
            *self.temperature,
        ]
        """All ways, as they are recorded with an image."""
        if not self.names:
            raise ValueError(
                f"`{KEY}` has no way: name some `ways`, guards, guidance or temperature, or set `explore` to null"
            )
        given = [*self.ways, *self.guards, *(guidance or ()), *(temperature or ())]
        if len(given) > len({*self.names}):
            raise ValueError(f"`{KEY}`: a way stands twice: {', '.join(self.names)}")

    def guard(self, way: str) -> Guard | None:
        """The guard of a way."""
        return self.guards[int(way.split()[1])] if way.startswith("guard ") else None


def _number(value: float) -> str:
    """A number in few digits that give it back exactly."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


@dataclass(frozen=True)
class Slot:
    """An image of a round: what is drawn, and how."""

    prompt: int
    """Number of its prompt in the round."""
    image: int
    """Number among the prompt's images."""
    text: str
    """What is drawn."""
    way: str
    seed: int
    """Of its initial noise."""
    kept: float = 1.0
    """Share of the prompt's words that are drawn."""
    counts: bool = False
    """Whether its cost is part of the expected cost: one of the first images of its prompt as it is."""

    @property
    def own(self) -> bool:
        """Whether the sampling policy draws it of the prompt as it is."""
        return self.way == OWN


def round_prompts(prompts: Sequence[Prompt], count: int, seed: int, number: int, name: str = "harmful") -> list[Prompt]:
    """The prompts of a round: the next ``count`` of an endless list in which every prompt stands once a pass."""
    found = []
    for place in range(number * count, (number + 1) * count):
        a_pass, row = divmod(place, len(prompts))
        found.append(prompts[int(permutation(len(prompts), "round-prompts", name, seed, a_pass)[row])])
    return found


def image_seed(seed: int, number: int, prompt: int, image: int) -> int:
    """The seed of an image's initial noise."""
    return derive(sample_seed(seed, number, f"round {prompt} {image}"), "initial-noise")


def column(image: int, first: int) -> int:
    """Which of a prompt's first images another one is compared with."""
    return image % first


def first_images(images: int, explore: Explore | None) -> int:
    """How many of a prompt's images are drawn of it as it is, before anything is explored."""
    return images if explore is None else min(images - 1, max(1, images - round(images * explore.share)))


def first_slots(prompts: Sequence[Prompt], images: int, seed: int, number: int) -> list[Slot]:
    """The first ``images`` of each prompt, of the prompt as it is."""
    return [
        Slot(prompt, image, row.prompt, OWN, image_seed(seed, number, prompt, image), counts=True)
        for prompt, row in enumerate(prompts)
        for image in range(images)
    ]


def more_slots(prompts: Sequence[Prompt], which: Sequence[int], images: range, seed: int, number: int) -> list[Slot]:
    """The other images of some prompts, of the prompt as it is."""
    return [
        Slot(prompt, image, prompts[prompt].prompt, OWN, image_seed(seed, number, prompt, image))
        for prompt in which
        for image in images
    ]


def explored_slots(
    prompts: Sequence[Prompt], which: Sequence[int], images: range, way: str, words: Words, seed: int, number: int
) -> list[Slot]:
    """The other images of some prompts, drawn in another way.

    Each begins from the noise of one of the first images: the two then have most of the scene in common.
    """
    found = []
    for prompt in which:
        given = prompts[prompt].prompt
        for image in images:
            change = {"drop": words.dropped, "nearest": words.nearest}.get(way)
            text = given if change is None else change(given, image_seed(seed, number, prompt, image))
            noise = image_seed(seed, number, prompt, column(image, images.start))
            found.append(Slot(prompt, image, text, way, noise, kept_share(given, text)))
    return found


@dataclass
class Round:
    """What was drawn, in the order of places."""

    number: int
    identity: str
    """Of all that it follows from: seed, round, weights and settings."""
    slots: list[Slot]
    latents: Tensor
    """(N, C, h, w)."""
    cost: Tensor
    quality: Tensor
    """(N,) each; quality is 0 without a scorer, before what exploring costs."""

    def write(self, folder: Path) -> None:
        """Write it into a folder, whole or not at all."""
        from safetensors.torch import save

        from lit_safety.core.files import write_atomic

        folder.mkdir(parents=True, exist_ok=True)
        about = {"identity": self.identity, "slots": json.dumps([asdict(slot) for slot in self.slots])}
        tensors = {"latents": self.latents, "cost": self.cost, "quality": self.quality}
        data = save({name: one.cpu().contiguous() for name, one in tensors.items()}, about)
        write_atomic(round_file(folder, self.number), data)

    @classmethod
    def read(cls, folder: Path, number: int, identity: str) -> Round | None:
        """What `write` has written of the same round; None: it is not there, damaged or of another run."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(round_file(folder, number), "pt") as file:
                about: dict[str, Any] = file.metadata() or {}
                if about.get("identity") != identity:
                    return None
                slots = [Slot(**one) for one in json.loads(about["slots"])]
                found = [file.get_tensor(name) for name in ("latents", "cost", "quality")]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None
        return cls(number, identity, slots, *found)


def round_file(folder: Path, number: int) -> Path:
    """Where a round's latents and what is known of them are."""
    return folder / f"round-{number:05d}.safetensors"


def weights_digest(weights: dict[str, Tensor]) -> str:
    """sha256 of named tensors."""
    import hashlib

    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sorted_prompts(prompts: Sequence[Prompt], file: str) -> tuple[list[Prompt], list[Prompt]]:
    """The harmful and the harmless prompts of a file.

    Raises:
        UserError: none is harmful.
    """
    harmful = [row for row in prompts if row.harmful]
    if not harmful:
        raise UserError(f"`model.init_args.prompts` {file}: holds 0 harmful prompts (column kind)")
    return harmful, [row for row in prompts if not row.harmful]
