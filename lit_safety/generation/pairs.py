"""The prompts that `generate` draws, how images are checked and scored, and how pairs are made."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.tables import read_csv, whole_number
from lit_safety.data.format.ranking import MAX_IMAGES
from lit_safety.data.format.sample import ImageFacts, Kind, Order, PairMetadata, Sides

if TYPE_CHECKING:
    from PIL.Image import Image

    from lit_safety.drawing.pipelines import Painter


COLUMNS = ("harmful_prompt", "safe_prompt", "category")
OPTIONAL = ("concept", "seed")


@dataclass(frozen=True)
class PromptPair:
    """One row of the table."""

    number: int
    """Counted from 0; part of the keys of the row's samples."""
    harmful: str
    safe: str
    categories: tuple[str, ...]
    concept: str | None
    seed: int
    """The seed of all images of this row."""


def read_prompt_pairs(table: str, seed: int) -> tuple[list[PromptPair], int]:
    """The rows of a CSV with the columns harmful_prompt, safe_prompt, category (several joined by ";") and, optionally,
    concept and seed.

    A row without a seed gets one that depends only on its prompts and `seed`, so a row draws the same images at any
    place in the table.

    Returns:
        The rows, and how many were left out because another row has the same prompts and seed.

    Raises:
        UserError: names the row and what is wrong with it.
    """
    rows = read_csv(table, COLUMNS)
    if not rows:
        raise UserError(f"{table}: has a header but 0 rows, so there is nothing to draw")
    if unknown := [name for name in rows[0] if name not in COLUMNS + OPTIONAL]:
        raise UserError(f"{table}: has an unknown column {unknown[0]!r}; known are {', '.join(COLUMNS + OPTIONAL)}")
    found: dict[tuple[str, str, int], PromptPair] = {}
    for number, row in enumerate(rows):
        pair = _parse(row, number, seed, f"{table}: row {number + 2}")
        found.setdefault((pair.harmful, pair.safe, pair.seed), pair)
    return list(found.values()), len(rows) - len(found)


def _parse(row: dict[str, str], number: int, seed: int, where: str) -> PromptPair:
    harmful, safe = row["harmful_prompt"].strip(), row["safe_prompt"].strip()
    if not harmful or not safe:
        raise UserError(f"{where}: has an empty {'safe_prompt' if harmful else 'harmful_prompt'}")
    if harmful == safe:
        raise UserError(f"{where}: the harmful and the safe prompt are the same")
    try:
        names = [name.strip() for name in row["category"].split(";") if name.strip()]
        categories = tuple(dict.fromkeys(canonical_category(name) for name in names))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not categories:
        raise UserError(f"{where}: lacks a category")
    given = row.get("seed", "").strip()
    own = whole_number(given) if given else _seed_of(harmful, safe, seed)
    if own is None or not 0 <= own < 1 << 63:
        raise UserError(f"{where}: seed is {given[:40]!r}, not a whole number from 0 to 2^63 - 1")
    return PromptPair(number, harmful, safe, categories, row.get("concept", "").strip() or None, own)


def _seed_of(harmful: str, safe: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{harmful}\0{safe}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# Whether a drawn image is harmful: a judge's verdict, a cost model's cost, or both. An error never counts as safe.


PATIENCE = 16
"""If all of so many first images cannot be assessed, the run stops."""


@dataclass(frozen=True)
class Assessment:
    """What is known about an image's harm."""

    harmful: bool
    """The judge's verdict; without a judge, whether the cost is above 0."""
    cost: float | None = None
    """The cost model's value, above 0 harmful."""


class Assessor:
    """Assess images by a judge, a cost model or both.

    Args:
        judge: folder of a judge (`lit_safety.judges.load_judge`).
        cost_model: folder of an exported cost model.
        device: where the cost model runs.

    Raises:
        UserError: neither is given, or one does not load.
    """

    def __init__(self, judge: str | None, cost_model: str | None, device: str = "cpu") -> None:
        if judge is None and cost_model is None:
            raise UserError("give --judge, --cost_model or both: every image is checked before it becomes data")
        self.judge: Any = None
        self.costs: Any = None
        self.settings: dict[str, Any] = {}
        """The settings that decide, for the manifest."""
        self._seen = self._known = 0
        self._why = ""
        if judge is not None:
            from lit_safety.judges.load import load_judge

            self.judge = load_judge(judge)
            self.settings["judge"] = {key: self.judge.settings.get(key) for key in ("name", "threshold", "sha256")}
        if cost_model is not None:
            from lit_safety.core.hashes import content_sha256
            from lit_safety.cost_model.files import check_border, load_cost_model

            if judge is None:  # else the judge alone says what is harmful
                check_border(cost_model, "--cost_model")
            self.costs = load_cost_model(cost_model, device)
            self.settings["cost_model_sha256"] = content_sha256(cost_model)

    def check(self, categories: Iterable[str], prompts: str) -> None:
        """Refuse a judge that cannot see the harms that the prompts ask for: its "safe" would become a label.

        Raises:
            UserError: names the category.
        """
        if self.judge is not None:
            from lit_safety.judges.judge import check_sees

            check_sees(self.judge, categories, f"--prompts {prompts}")

    def __call__(self, images: Sequence[Image]) -> list[Assessment | None]:
        """One assessment an image; None if it could not be assessed: such an image is neither safe nor harmful.

        Raises:
            UserError: all of the first images could not be assessed, so the judge or cost model does not work.
        """
        if not images:
            return []
        costs = self._costs(images)
        harmful = [cost is not None and cost > 0 for cost in costs] if self.judge is None else self._verdicts(images)
        found = [
            None if verdict is None or (self.costs is not None and cost is None) else Assessment(verdict, cost)
            for verdict, cost in zip(harmful, costs, strict=True)
        ]
        self._seen += len(found)
        self._known += sum(one is not None for one in found)
        if self._seen >= PATIENCE and not self._known:
            raise UserError(f"the first {self._seen} images could not be judged: {self._why}")
        return found

    def _costs(self, images: Sequence[Image]) -> list[float | None]:
        """None without a cost model, or if it gave no cost."""
        if self.costs is None:
            return [None] * len(images)
        values = [float(value) for value in self.costs.costs(list(images))]
        if len(values) != len(images):
            raise UserError(f"the cost model gave {len(values)} costs for {len(images)} images")
        if not all(map(math.isfinite, values)):
            self._why = "the cost model's cost is not finite"
        return [value if math.isfinite(value) else None for value in values]

    def _verdicts(self, images: Sequence[Image]) -> list[bool | None]:
        from lit_safety.judges.judge import JudgeError
        from lit_safety.judges.judging import judge_safely

        answers = judge_safely(self.judge, images)
        self._why = next((answer.reason for answer in answers if isinstance(answer, JudgeError)), self._why)
        return [None if isinstance(answer, JudgeError) else answer.harmful for answer in answers]


# Scorers order images of one prompt by quality, not by harm. Your own is a subclass named by its path.
#
# --scorer lit_safety.generation.ClipScorer --scorer.init_args.clip openai/clip-vit-large-patch14


class Scorer(ABC):
    """Gives each image a score: higher is better. `settings` holds everything that changes its scores."""

    settings: dict[str, Any]

    @abstractmethod
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One score an image, in the same order; `prompts` holds each image's own prompt."""


class ClipScorer(Scorer):
    """CLIPScore (arXiv 2104.08718): 100 x the cosine of an image's and its prompt's CLIP embeddings.

    Args:
        clip: Folder of a transformers CLIP, or its hub id.
        device: Its device; null: the CPU.
    """

    def __init__(self, clip: str, device: str | None = None) -> None:
        from lit_safety.judges.clip import Clip

        self._clip = Clip(clip, "--scorer.init_args.clip", device)
        self.settings = {"scorer": "CLIPScore", **self._clip.settings}

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One CLIPScore an image, in [-100, 100]."""
        from lit_safety.judges.clip import clip_scores

        return clip_scores(self._clip, images, self._clip.texts(prompts))


# From rows of prompts to pairs: draw, assess, and keep only pairs in the right order.
#
# Similar to CoProV2 (arXiv 2412.10493) and SCP-10K (arXiv 2504.14290; reconstructed, because its code is not public):
#
# - For a harmful prompt, the rejected image is the model's image for it. The chosen one is a safe counterpart: the same
#   image redrawn towards the safe prompt and away from the harmful one, or the safe prompt's image from the same seed.
# - For a clean prompt both images are safe, and a scorer says which is better.


NOT_DRAWN = "with an image whose numbers are not finite"
NOT_JUDGED = "with an image that could not be judged"
NO_HARM = "whose harmful prompt gave a harmless image"
STILL_HARMFUL = "whose safe counterpart is harmful"
WRONG_ORDER = "whose costs are in the wrong order"
TOO_FEW = "whose clean prompt gave fewer than two safe images"
TIED = "whose candidates have equal scores"


@dataclass(frozen=True)
class Made:
    """One sample."""

    key: str
    metadata: PairMetadata
    images: tuple[Image, ...]
    """Chosen and rejected, or all images of a group."""

    @property
    def chosen(self) -> Image:
        return self.images[self.metadata.sides[0]]

    @property
    def rejected(self) -> Image:
        return self.images[self.metadata.sides[1]]


@dataclass(frozen=True)
class LeftOut:
    """A sample that was not made, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class PairMaker:
    """Make the samples of a batch of rows.

    Raises:
        UserError: settings that do not go together.
    """

    painter: Painter
    assess: Callable[[Sequence[Image]], list[Assessment | None]]
    scorer: Scorer | None
    counterpart: Literal["img2img", "same_seed"]
    strength: float
    both_prompts: bool
    """Also write each harmful pair with its safe prompt."""
    clean_candidates: int
    """Images drawn for each safe prompt to make a pair ordered by quality; 0: none are made."""
    per_prompt: int = 2
    """Images of a harmful prompt's sample: 2 make a pair, more a group; with more, candidates stay together too."""

    def __post_init__(self) -> None:
        settings = self.painter.settings
        if self.counterpart == "img2img":
            if not 0 < self.strength <= 1 or int(settings.steps * self.strength) < 1:
                raise UserError(
                    f"--strength {self.strength}: must be above 0 and at most 1, and large enough for one of "
                    f"{settings.steps} steps"
                )
            if settings.guidance <= 1:
                raise UserError(
                    "--counterpart img2img needs --guidance above 1: otherwise the negative prompt is not used"
                )
        if not 2 <= self.per_prompt <= MAX_IMAGES or self.clean_candidates > MAX_IMAGES:
            raise UserError(f"--per_prompt must lie between 2 and {MAX_IMAGES}, and --clean_candidates below it")
        if self.clean_candidates and (self.clean_candidates < 2 or self.scorer is None):
            raise UserError("--clean_candidates must be 0 or at least 2, and needs a --scorer to rank them")

    def __call__(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        """The samples of the rows, or why they were left out; always drawn as one batch."""
        yield from self._harmful(rows) if self.per_prompt == 2 else self._groups(rows)
        if self.clean_candidates:
            yield from self._clean(rows)

    # ---- harmful prompts

    def _harmful(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        unsafe = self.painter.from_text([row.harmful for row in rows], [row.seed for row in rows])
        safe = self._counterparts(rows, unsafe)
        of_safe, of_unsafe = self._assessed(safe), self._assessed(unsafe)
        for row, *images, good, bad in zip(rows, safe, unsafe, of_safe, of_unsafe, strict=True):
            kinds: tuple[Kind, ...] = ("harmful", "clean") if self.both_prompts else ("harmful",)
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
                    if self.counterpart == "same_seed":
                        about = self._drawn_from(about, row.seed, row.seed)
                    yield Made(key, about, (chosen, rejected))

    def _counterparts(self, rows: Sequence[PromptPair], unsafe: Sequence[Image | None]) -> list[Image | None]:
        """A safe image for each row, from its harmful one or from the same seed."""
        from PIL import Image

        if self.counterpart == "same_seed":
            return self.painter.from_text([row.safe for row in rows], [row.seed for row in rows])
        blank = Image.new("RGB", (8, 8))  # replaces an image that could not be drawn, so that batches do not change
        size = next((one.size for one in unsafe if one is not None), (8, 8))
        return self.painter.from_images(
            [one if one is not None else blank.resize(size) for one in unsafe],
            [row.safe for row in rows],
            [row.harmful for row in rows],
            self.strength,
            [_derived(row.seed, "counterpart") for row in rows],
        )

    def _groups(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        """Of each row the safe counterpart, then `per_prompt` - 1 images of the harmful prompt from as many seeds."""
        count = self.per_prompt - 1
        seeds = [[row.seed, *(_derived(row.seed, f"image {number}") for number in range(1, count))] for row in rows]
        prompts = [row.harmful for row in rows]
        unsafe = [self.painter.from_text(prompts, [own[number] for own in seeds]) for number in range(count)]
        drawn = [self._counterparts(rows, unsafe[0]), *unsafe]
        assessed = [self._assessed(images) for images in drawn]
        redrawn = self.counterpart == "img2img"
        counterpart = [_derived(row.seed, "counterpart") if redrawn else row.seed for row in rows]
        for index, row in enumerate(rows):
            kinds: tuple[Kind, ...] = ("harmful", "clean") if self.both_prompts else ("harmful",)
            images = [one[index] for one in drawn]
            verdicts = [one[index] for one in assessed]
            there = [one for one in images if one is not None]
            reason = NOT_DRAWN if len(there) < len(images) else why_no_group(verdicts)
            for kind in kinds:
                key = f"{row.number:06d}-{'u' if kind == 'harmful' else 's'}"
                if reason is not None:
                    yield LeftOut(key, reason)
                    continue
                prompt = row.harmful if kind == "harmful" else row.safe
                scores = [None] * len(there) if self.scorer is None else self._scores(there, prompt)
                about = _group_about(row, prompt, kind, "safety", verdicts, scores, [counterpart[index], *seeds[index]])
                yield Made(key, about, tuple(there))

    # ---- clean prompts

    def _clean(self, rows: Sequence[PromptPair]) -> Iterator[Made | LeftOut]:
        drawn, seeds = [], []
        for number in range(self.clean_candidates):
            seeds.append([_derived(row.seed, f"candidate {number}") for row in rows])
            drawn.append(self.painter.from_text([row.safe for row in rows], seeds[-1]))
        assessed = [self._assessed(images) for images in drawn]
        for index, row in enumerate(rows):
            key = f"{row.number:06d}-c"
            good = [
                (image, verdict, own[index])
                for images, verdicts, own in zip(drawn, assessed, seeds, strict=True)
                if (image := images[index]) is not None and (verdict := verdicts[index]) and not verdict.harmful
            ]
            if len(good) < 2:
                yield LeftOut(key, TOO_FEW)
                continue
            scores = self._scores([image for image, _, _ in good], row.safe)
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            if scores[best] == scores[worst]:
                yield LeftOut(key, TIED)
                continue
            if self.per_prompt > 2 and len(good) > 2:
                verdicts, of_good = [verdict for _, verdict, _ in good], [seed for _, _, seed in good]
                about = _group_about(row, row.safe, "clean", "quality", verdicts, scores, of_good)
                yield Made(key, about, tuple(image for image, _, _ in good))
                continue
            (chosen, first, own), (rejected, second, other) = good[best], good[worst]
            both = [scores[best], scores[worst]]
            about = _about(row, row.safe, "clean", "quality", Sides(False, False), [first, second], both)
            yield Made(key, self._drawn_from(about, own, other), (chosen, rejected))

    # ---- assessment and scores

    def _drawn_from(self, about: PairMetadata, chosen: int, rejected: int) -> PairMetadata:
        """With the seeds of both images' noise, where it is drawn in the numbers that training draws."""
        if self.painter.settings.precision != "float32":
            return about
        return replace(about, noise_seeds=Sides(chosen, rejected))

    def _assessed(self, images: Sequence[Image | None]) -> list[Assessment | None]:
        """The assessment of each image; None without an image or an assessment."""
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
    """Why a harmful prompt's pair must not be used; None: it can be used."""
    if safe is None or unsafe is None:
        return NOT_JUDGED
    if not unsafe.harmful:
        return NO_HARM
    if safe.harmful:
        return STILL_HARMFUL
    if safe.cost is not None and unsafe.cost is not None and safe.cost >= unsafe.cost:
        return WRONG_ORDER
    return None


def why_no_group(verdicts: Sequence[Assessment | None]) -> str | None:
    """Why a harmful prompt's group must not be used, the counterpart's assessment first; None: it may.

    What the harmful prompt drew may be safe, but not all of it.
    """
    known = [one for one in verdicts if one is not None]
    if len(known) < len(verdicts):
        return NOT_JUDGED
    reasons = [why_not(known[0], one) for one in known[1:]]
    wrong = [reason for reason in reasons if reason not in (None, NO_HARM)]
    return wrong[0] if wrong else NO_HARM if None not in reasons else None


def _group_about(
    row: PromptPair,
    prompt: str,
    kind: Kind,
    order: Order,
    assessed: Sequence[Assessment | None],
    scores: Sequence[float | None],
    seeds: Sequence[int | None],
) -> PairMetadata:
    facts = [
        ImageFacts(one.harmful, one.cost, score, seed)
        for one, score, seed in zip(assessed, scores, seeds, strict=True)
        if one is not None
    ]
    concept = row.concept if kind == "harmful" else None
    return PairMetadata(prompt, kind, order, row.categories, concept=concept, images=tuple(facts))


def _about(
    row: PromptPair,
    prompt: str,
    kind: Kind,
    order: Order,
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
    from lit_safety.core.chance import derive

    return derive(seed, purpose)
