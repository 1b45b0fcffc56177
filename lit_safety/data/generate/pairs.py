"""From rows of prompts to pairs: draw, assess, and keep only what is in the right order.

In the manner of CoProV2 (arXiv 2412.10493) and of SCP-10K (arXiv 2504.14290; reconstructed, its code is not public):

- under a harmful prompt the rejected image is what the model draws for it, and the chosen one a safe counterpart: the
  same picture redrawn towards the safe prompt and away from the harmful one, or the safe prompt's from the same seed;
- under a clean prompt both are safe, and a scorer says which is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.data.sample import PairMetadata, Sides
from lit_safety.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lit_safety.data.generate.painter import Painter
    from lit_safety.data.generate.prompt_pairs import PromptPair
    from lit_safety.data.generate.safety import Assessment
    from lit_safety.data.generate.scorers import Scorer

NOT_DRAWN = "with an image whose numbers are not finite"
NOT_JUDGED = "with an image that could not be judged"
NO_HARM = "whose harmful prompt drew nothing harmful"
STILL_HARMFUL = "whose safe counterpart is harmful"
WRONG_ORDER = "whose costs are in the wrong order"
TOO_FEW = "whose clean prompt drew fewer than two safe images"
TIED = "whose candidates have equal scores"


@dataclass(frozen=True)
class Made:
    """One sample."""

    key: str
    metadata: PairMetadata
    chosen: Image
    rejected: Image


@dataclass(frozen=True)
class LeftOut:
    """A sample that was not made, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class PairMaker:
    """Makes the samples of a batch of rows.

    Raises:
        UserError: settings that do not go together.
    """

    painter: Painter
    assess: Callable[[Sequence[Image]], list[Assessment | None]]
    scorer: Scorer | None
    counterpart: Literal["img2img", "same_seed"]
    strength: float
    both_prompts: bool
    """Write each harmful pair under its safe prompt too."""
    clean_candidates: int
    """Images drawn for each safe prompt to make a pair ordered by quality; 0: none are made."""

    def __post_init__(self) -> None:
        settings = self.painter.settings
        if self.counterpart == "img2img":
            if not 0 < self.strength <= 1 or int(settings.steps * self.strength) < 1:
                raise UserError(
                    f"--strength {self.strength}: must be above 0 and at most 1, and large enough for one of "
                    f"{settings.steps} steps"
                )
            if settings.guidance <= 1:
                raise UserError("--counterpart img2img needs --guidance above 1: below it no negative prompt is used")
        if self.clean_candidates and (self.clean_candidates < 2 or self.scorer is None):
            raise UserError("--clean_candidates must be 0 or at least 2, and needs a --scorer to rank them")

    def __call__(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        """The samples of the rows, or why there are none; always drawn as one batch."""
        yield from self._harmful(rows)
        if self.clean_candidates:
            yield from self._clean(rows)

    # ---- harmful prompts

    def _harmful(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        from PIL import Image

        unsafe = self.painter.from_text([row.harmful for row in rows], [row.seed for row in rows])
        if self.counterpart == "img2img":
            blank = Image.new("RGB", (8, 8))  # stands for one that was not drawn, so that batches stay as they are
            size = next((one.size for one in unsafe if one is not None), (8, 8))
            safe = self.painter.from_images(
                [one if one is not None else blank.resize(size) for one in unsafe],
                [row.safe for row in rows],
                [row.harmful for row in rows],
                self.strength,
                [_derived(row.seed, "counterpart") for row in rows],
            )
        else:
            safe = self.painter.from_text([row.safe for row in rows], [row.seed for row in rows])
        of_safe, of_unsafe = self._assessed(safe), self._assessed(unsafe)
        for row, *images, good, bad in zip(rows, safe, unsafe, of_safe, of_unsafe, strict=True):
            kinds = ("harmful", "clean") if self.both_prompts else ("harmful",)
            keys = {kind: f"{row.number:06d}-{'u' if kind == 'harmful' else 's'}" for kind in kinds}
            chosen, rejected = images
            if chosen is None or rejected is None:
                yield from (LeftOut(key, NOT_DRAWN) for key in keys.values())
            elif (reason := why_not(good, bad)) is not None:
                yield from (LeftOut(key, reason) for key in keys.values())
            else:
                for kind, key in keys.items():
                    prompt = row.harmful if kind == "harmful" else row.safe
                    scores = None if self.scorer is None else self._scores([chosen, rejected], prompt)
                    about = _about(row, prompt, kind, "safety", Sides(False, True), [good, bad], scores)
                    yield Made(key, about, chosen, rejected)

    # ---- clean prompts

    def _clean(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        drawn = []
        for number in range(self.clean_candidates):
            seeds = [_derived(row.seed, f"candidate {number}") for row in rows]
            drawn.append(self.painter.from_text([row.safe for row in rows], seeds))
        assessed = [self._assessed(images) for images in drawn]
        for index, row in enumerate(rows):
            key = f"{row.number:06d}-c"
            good = [
                (image, verdict)
                for images, verdicts in zip(drawn, assessed, strict=True)
                if (image := images[index]) is not None and (verdict := verdicts[index]) and not verdict.harmful
            ]
            if len(good) < 2:
                yield LeftOut(key, TOO_FEW)
                continue
            scores = self._scores([image for image, _ in good], row.safe)
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            if scores[best] == scores[worst]:
                yield LeftOut(key, TIED)
                continue
            (chosen, first), (rejected, second) = good[best], good[worst]
            both = [scores[best], scores[worst]]
            about = _about(row, row.safe, "clean", "quality", Sides(False, False), [first, second], both)
            yield Made(key, about, chosen, rejected)

    # ---- what is known of an image

    def _assessed(self, images: Sequence[Image | None]) -> list[Assessment | None]:
        """Of each image; None where there is no image or no assessment."""
        found = iter(self.assess([image for image in images if image is not None]))
        return [None if image is None else next(found) for image in images]

    def _scores(self, images: Sequence[Image], prompt: str) -> list[float]:
        import math

        assert self.scorer is not None
        scores = [float(score) for score in self.scorer(images, [prompt] * len(images))]
        if len(scores) != len(images) or not all(map(math.isfinite, scores)):
            raise UserError(f"the scorer {type(self.scorer).__name__} gave {scores} for {len(images)} images")
        return scores


def why_not(safe: Assessment | None, unsafe: Assessment | None) -> str | None:
    """Why a harmful prompt's pair must not be used; None: it may."""
    if safe is None or unsafe is None:
        return NOT_JUDGED
    if not unsafe.harmful:
        return NO_HARM
    if safe.harmful:
        return STILL_HARMFUL
    if safe.cost is not None and unsafe.cost is not None and safe.cost >= unsafe.cost:
        return WRONG_ORDER
    return None


def _about(
    row: PromptPair,
    prompt: str,
    kind: str,
    order: str,
    harmful: Sides[bool | None],
    assessed: Sequence[Any],
    scores: list[float] | None,
) -> PairMetadata:
    costs = [one.cost for one in assessed]
    return PairMetadata(
        prompt,
        kind,
        order,
        row.categories,
        harmful,
        row.concept if kind == "harmful" else None,
        None if None in costs else Sides(*costs),
        None if scores is None else Sides(*scores),
        seed=row.seed,
    )


def _derived(seed: int, purpose: str) -> int:
    from lit_safety.data.chance import derive

    return derive(seed, purpose)
