"""The interface of judges, which decide whether an image is harmful, and their verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from PIL.Image import Image

    from lit_safety.drawing.prompts import Prompt


@dataclass(frozen=True)
class Verdict:
    """What a judge says about one image."""

    harmful: bool
    """Whether the image shows any harm."""
    scores: dict[str, float] = field(default_factory=dict)
    """Label -> probability that it is in the image, for harm concepts and benign objects."""
    categories: dict[str, float] = field(default_factory=dict)
    """Category -> the largest probability among its concepts."""
    confidence: float = 1.0
    """The confidence of the least certain label: min over labels of max(p, 1 - p), in [0.5, 1]."""
    present: frozenset[str] = frozenset()
    """The labels and categories that the judge, by its own threshold, says are in the image."""
    counts: Mapping[str, int] | None = None
    """Label that is present -> 1, or 2 for two and more; None: the judge does not count."""

    def missing(self, asked: Sequence[str]) -> list[str]:
        """The things asked for that are not in the image."""
        return [name for name in asked if name not in self.present]

    def miscounted(self, asked: Sequence[str]) -> list[str] | None:
        """Things that are there twice but asked for once, or the reverse; None: the judge does not count."""
        if self.counts is None:
            return None
        there = [name for name in dict.fromkeys(asked) if name in self.present]
        return [name for name in there if self.counts.get(name, 1) != min(2, asked.count(name))]

    def as_asked(self, asked: Sequence[str]) -> bool:
        """Whether each is there, and, if the judge counts, as often as asked for."""
        return not self.missing(asked) and not self.miscounted(asked)


@dataclass(frozen=True)
class JudgeError:
    """An image that could not be judged. It is neither safe nor harmful, but an error in the report."""

    reason: str


@dataclass(frozen=True)
class NotJudged(JudgeError):
    """An image of a prompt for a category that the judge cannot see. It is not an error, and neither safe nor
    harmful."""

    verdict: Verdict = field(default_factory=lambda: Verdict(False))
    """What the judge said, which is valid for the categories that it can see."""


class Judge(Protocol):
    """Judges images. `settings` holds everything that changes its verdicts: threshold, classes, sha256 of weights.

    `settings["labels"]` lists the labels and categories it can recognise; figures that ask for others are left out.
    `settings["counts"]` is set if the judge says how many there are of a thing.
    `settings["categories"]` lists the categories whose harm it sees; prompts for others are "not judged". Without it
    the judge counts as seeing all.

    A judge with networks may have a method `place(where: Place)` (`placing.place`), by which commands that draw move
    them to the device that draws.
    """

    name: str
    settings: dict[str, Any]

    def judge(self, images: Sequence[Image]) -> list[Verdict | JudgeError]:
        """One answer an image, in the same order."""
        ...


def in_order(categories: Iterable[str]) -> list[str]:
    """Categories, each once, in the order of `CATEGORIES`."""
    found = set(categories)
    return [category for category in CATEGORIES if category in found]


def unseen(settings: Mapping[str, Any], categories: Iterable[str]) -> list[str]:
    """Those of `categories` whose harm a judge with these settings does not see."""
    seen = settings.get("categories")
    return [] if seen is None else [category for category in categories if category not in seen]


def asked_of(prompt: Prompt) -> tuple[str, ...]:
    """The categories of harm that a prompt asks for; empty for a harmless prompt."""
    return (prompt.category, *prompt.also) if prompt.harmful else ()


def where_seen(
    judge: Judge, prompts: Sequence[Prompt], verdicts: Sequence[Verdict | JudgeError]
) -> list[Verdict | JudgeError]:
    """Verdicts, in which "safe" about a category that the judge cannot see becomes a `NotJudged`."""
    found: list[Verdict | JudgeError] = []
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        blind = unseen(judge.settings, asked_of(prompt))
        if blind and isinstance(verdict, Verdict) and not verdict.harmful:
            found.append(NotJudged(f"not judged: {judge.name} does not see {', '.join(blind)}", verdict))
        else:
            found.append(verdict)
    return found


def verdict_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a judge that change its verdicts: all except the list of what it sees, also in its members."""
    found = {key: value for key, value in settings.items() if key not in ("categories", "seen_by")}
    if found.get("precision") == "float32":  # answers of before it was noted are of float32
        del found["precision"]
    if isinstance(members := found.get("members"), list):
        found["members"] = [verdict_settings(one) for one in members]
    return found


def without_precision(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a judge, a scorer or a measure without the number format, also in its members."""
    found = {key: value for key, value in settings.items() if key != "precision"}
    if isinstance(members := found.get("members"), list):
        found["members"] = [without_precision(one) for one in members]
    return found


def rule_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a judge that change its verdicts, but for the number format: by these an audit knows its
    judge."""
    return without_precision(verdict_settings(settings))


def figure_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a judge that change figures: also the categories that it sees, if these are not all.

    The number format is left out, as that of drawing is (`DrawingSettings.protocol`): reports from a CPU and from a GPU
    can be compared.
    """
    blind = unseen(settings, CATEGORIES)
    return rule_settings(settings) | ({"categories": settings["categories"]} if blind else {})


def check_sees(judge: Judge, categories: Iterable[str], what: str) -> None:
    """Refuse a judge for a task in which its "safe" about a category that it cannot see would count as a verdict.

    Raises:
        UserError: names the category.
    """
    if blind := unseen(judge.settings, in_order(categories)):
        raise UserError(
            f"{what} is about {', '.join(blind)}, which the judge {judge.name} does not see: it would call everything "
            f"safe (it sees {', '.join(judge.settings['categories'])}); use another judge, or leave those prompts out"
        )


def check_labels(judge: Judge, prompts: Sequence[Prompt], file: str) -> None:
    """Refuse a judge that knows names of things, but not the ones that the prompts ask for.

    A judge that knows only categories is asked only about categories.

    Raises:
        UserError: a concept or benign object is not a label of the judge.
    """
    labels: list[str] = judge.settings.get("labels", [])
    for prompt in prompts if set(labels) - set(CATEGORIES) else ():
        unknown = [name for name in (prompt.concept, *prompt.benign) if name and name not in labels]
        if unknown:
            raise UserError(
                f"{file}: the prompt `{prompt.prompt}` asks for {unknown[0]}, which the judge {judge.name} cannot "
                f"recognise; use the judge that belongs to these prompts (this one knows {', '.join(labels)})"
            )
