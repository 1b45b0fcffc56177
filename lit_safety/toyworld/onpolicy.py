"""The on-policy set: preference pairs of which the base pipeline itself draws both images.

Nothing looks at a picture here. An image is labelled by the prompt it was drawn from: harmful if that asked for a harm.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lit_safety.toyworld.captions import JOINERS, TEMPLATES, fold, say
from lit_safety.toyworld.objects import CONCEPTS
from lit_safety.toyworld.pairs import IMPLICIT, KINDS, SEEN_PHRASES
from lit_safety.toyworld.sampling import Contents, draw_contents, draw_setting
from lit_safety.toyworld.seeds import SEEDS, stream

OWNER = "pairs_onpolicy"

How = Literal["full", "one_step", "overguided"]
WAYS: dict[How, tuple[int, float]] = {"full": (20, 3.0), "one_step": (1, 1.0), "overguided": (3, 8.0)}
"""Steps and guidance. "full" is how the pipeline is meant to draw. One step blurs and leaves ghosts of other places;
few steps of strong guidance bend colours and shapes. With 3 steps alone the base draws as well as with 20."""
WORSE = 0.5
"""What a worse way of drawing leaves of the score."""


@dataclass(frozen=True)
class Order:
    """One image to draw."""

    prompt: str
    seed: int
    how: How = "full"


@dataclass(frozen=True)
class PlannedPair:
    """A pair before its images are drawn."""

    key: str
    metadata: dict[str, Any]
    chosen: Order
    rejected: Order


def _held_in(setting: str, *all_contents: Contents) -> bool:
    """Whether no image of the pair shows a combination that validation or test asks for."""
    return all(fold(setting, contents) == "train" for contents in all_contents)


def _find_harmful(rng: np.random.Generator, concept: str) -> tuple[str, Contents, Contents]:
    """Setting, harmful contents, and the same without the harm; a harm alone gives way to its look-alike."""
    layout = "harm" if rng.random() < 0.25 else "harm_benign"
    while True:
        setting, asked = draw_setting(rng, concept), draw_contents(rng, layout, concept)
        without = tuple(thing for thing in asked if thing[0] != concept)
        without = without or ((CONCEPTS[concept].lookalike, None),)
        if _held_in(setting, asked, without):
            return setting, asked, without


def _find_clean(rng: np.random.Generator, concept: str) -> tuple[str, Contents, Contents]:
    """Setting, clean contents, and the same with the harm beside its one thing or in the place of one of two."""
    layout = str(rng.choice(["benign", "benign_benign", "lookalike", "lookalike_benign"], p=[0.45, 0.3, 0.1, 0.15]))
    while True:
        setting, asked = draw_setting(rng, concept), draw_contents(rng, layout)
        if layout.startswith("lookalike"):
            lookalike = CONCEPTS[concept].lookalike
            asked = tuple(thing if thing[1] else (lookalike, None) for thing in asked)
            harmful = tuple((concept, None) if thing == (lookalike, None) else thing for thing in asked)
        elif len(asked) == 1:
            harmful = (*asked, (concept, None)) if rng.random() < 0.5 else ((concept, None), *asked)
        else:
            gone = int(rng.integers(2))
            harmful = tuple((concept, None) if i == gone else thing for i, thing in enumerate(asked))
        if _held_in(setting, asked, harmful):
            return setting, asked, harmful


def _find_quality(rng: np.random.Generator) -> tuple[str, Contents, Contents]:
    layout = str(rng.choice(["benign", "benign_benign", "lookalike_benign"], p=[0.35, 0.4, 0.25]))
    while True:
        setting, asked = draw_setting(rng, None), draw_contents(rng, layout)
        if _held_in(setting, asked):
            return setting, asked, asked


def _worth(asked: Contents, drawn: Contents, how: How) -> float:
    """Score: the share of the asked benign things that the image's own prompt names, halved if it is drawn worse."""
    wanted = [thing for thing in asked if thing[0] not in CONCEPTS]
    share = sum(thing in drawn for thing in wanted) / len(wanted) if wanted else 1.0
    return round(share * (1.0 if how == "full" else WORSE), 3)


def plan_pair(index: int) -> PlannedPair:
    """Pair number `index`; kinds, and concepts within a kind, take turns as in `pairs.make_pair`."""
    rng, seed = stream(OWNER, index), SEEDS[OWNER][index]
    rounds, place = divmod(index, len(KINDS))
    kind = KINDS[place]
    turn = rounds * KINDS.count(kind) + KINDS[:place].count(kind)
    concept = list(CONCEPTS)[turn % len(CONCEPTS)]
    phrase: int | None = None
    if kind == "harmful":
        setting, rejected, chosen = _find_harmful(rng, concept)
        asked = rejected
        phrase = int(rng.choice(SEEN_PHRASES)) if rng.random() < IMPLICIT else None
    elif kind == "clean_harm":
        setting, chosen, rejected = _find_clean(rng, concept)
        asked = chosen
    else:
        setting, chosen, rejected = _find_quality(rng)
        asked = chosen
    template, joiner = str(rng.choice(TEMPLATES)), str(rng.choice(JOINERS))
    good = Order(say(setting, chosen, template, joiner), seed)
    bad = Order(say(setting, rejected, template, joiner, phrase), seed)
    if kind == "clean_quality":
        bad = replace(bad, how=("one_step", "overguided")[rounds % 2])
    harmful = kind == "harmful"
    metadata: dict[str, Any] = {
        "prompt": bad.prompt if harmful else good.prompt,
        "prompt_kind": "harmful" if harmful else "clean",
        "categories": [] if kind == "clean_quality" else [CONCEPTS[concept].category],
        "harmful": {"chosen": False, "rejected": kind != "clean_quality"},
        "order": "quality" if kind == "clean_quality" else "safety",
        "score": {"chosen": _worth(asked, chosen, good.how), "rejected": _worth(asked, rejected, bad.how)},
        "source": f"toyworld/onpolicy/{kind}",
        "seed": seed,
    }
    if harmful:
        metadata["concept"] = concept
    return PlannedPair(f"onpolicy{index:07d}", metadata, good, bad)


def plan_pairs(count: int) -> Iterator[PlannedPair]:
    """The first `count` pairs."""
    return (plan_pair(index) for index in range(count))
