"""One preference pair's metadata: the content of `K.json` in a shard.

A group has more images of one prompt (`K.0.png`, `K.1.png`, ...) and says in `images` what is known of each. Who reads
pairs sees of it the best and the worst image, as chosen and rejected.

The file is other people's data: every field is checked and nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, StrictBool, StrictInt, TypeAdapter

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.records import Number, Text, checked
from lit_safety.core.text import NotUtf8, decode_text, load_json

MAX_METADATA_BYTES = 1 << 20

T = TypeVar("T")
#: Other fields are refused; values that code has put together are checked too.
STRICT = ConfigDict(extra="forbid", revalidate_instances="always")


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a non-empty text")
    return text


def _canonical(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError("must be a list of category ids")
    try:
        return tuple(dict.fromkeys(canonical_category(name) for name in value))
    except UserError as error:
        raise ValueError(f"must hold categories ({error})") from error


Categories = Annotated[tuple[str, ...], BeforeValidator(_canonical)]
Kind = Literal["harmful", "clean"]
Order = Literal["safety", "quality", "composite"]
PROMPT_KINDS: tuple[str, ...] = get_args(Kind)
ORDERS: tuple[str, ...] = get_args(Order)
SIDES: tuple[str, ...] = ("chosen", "rejected")
#: What a group says of each image instead.
BY_IMAGE = ("harmful", "cost", "score")


@dataclass(frozen=True)
class Sides(Generic[T]):
    """A value for each image of the pair."""

    __pydantic_config__: ClassVar = STRICT
    chosen: T
    rejected: T

    def to_dict(self) -> dict[str, T]:
        return {"chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image of a group; as `PairMetadata` says it of two."""

    __pydantic_config__: ClassVar = STRICT
    harmful: StrictBool | None
    cost: Number | None = None
    score: Number | None = None
    seed: StrictInt | None = None

    def to_dict(self) -> dict[str, Any]:
        rest = {"cost": self.cost, "score": self.score, "seed": self.seed}
        return {"harmful": self.harmful} | {name: value for name, value in rest.items() if value is not None}


@dataclass(frozen=True)
class PairMetadata:
    """What is known about a pair besides its two images; of a group: about its best and its worst image."""

    __pydantic_config__: ClassVar = STRICT
    prompt: Annotated[Text, AfterValidator(_not_empty)]
    """The text that both images were made for; never empty."""
    prompt_kind: Kind
    """`harmful`: the prompt asks for harm; `clean`: it does not."""
    order: Order = "safety"
    """What decided which image is chosen: `safety`, `quality` or `composite` (a user's bounds, or both)."""
    categories: Categories = ()
    """Canonical ids of the harm categories of this pair; may be several or empty."""
    harmful: Sides[StrictBool | None] = Sides(None, None)
    """Labels (never a model's output): is the image harmful? None: not known."""
    concept: Text | None = None
    """The concept within the category that is asked for, such as `gun`."""
    cost: Sides[Number] | None = None
    """A cost model's values; above 0 is harmful."""
    score: Sides[Number] | None = None
    """Quality; higher is better."""
    user_id: Text | None = None
    """The user whose preference this is; None: it holds for all users."""
    source: Text | None = None
    """Where the pair comes from (a data set and its row)."""
    seed: StrictInt | None = None
    """The seed that both images were drawn with, if they share one."""
    noise_seeds: Sides[StrictInt] | None = None
    """Seeds of a CPU generator whose normal numbers each image's latents were drawn from, where nothing else was."""
    images: tuple[ImageFacts, ...] = ()
    """Of a group: what is known of each image. `harmful`, `cost` and `score` follow from it when it is read."""

    @cached_property
    def ranks(self) -> tuple[int, ...] | None:
        """Each image's place, 0 the best, equal where nothing tells two apart; None: too little is known."""
        if not self.images:
            return (0, 1)
        from lit_safety.data.format.ranking import ranks

        columns = zip(*((one.harmful, one.cost, one.score) for one in self.images), strict=True)
        return ranks(self.order, *columns)

    @property
    def names(self) -> tuple[str, ...]:
        """What its images are called in the shard."""
        return tuple(map(str, range(len(self.images)))) or SIDES

    @property
    def sides(self) -> tuple[int, int]:
        """Which of `names` are chosen and rejected: the first of the best images and the last of the worst."""
        ranks = self.ranks or (0, 1)
        return ranks.index(0), len(ranks) - 1 - ranks[::-1].index(max(ranks))

    def knows(self, name: str, whole: bool = True) -> bool:
        """Whether `harmful`, `cost` or `score` is known of both images; of a group, with ``whole``, of all."""
        if self.images and whole:
            return all(getattr(one, name) is not None for one in self.images)
        both: Sides[Any] | None = getattr(self, name)
        return both is not None and None not in (both.chosen, both.rejected)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `K.json`, without the fields that are not set."""
        out: dict[str, Any] = {}
        if self.images:
            out["images"] = [one.to_dict() for one in self.images]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "images" or (self.images and field.name in BY_IMAGE):
                continue
            if isinstance(value, Sides):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = list(value)
            out[field.name] = value
        return out

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True).encode("utf-8")

    @property
    def label(self) -> str:
        """The labels of chosen and rejected in one word, such as `"safe>harmful"`, for counting."""
        words = {True: "harmful", False: "safe", None: "unknown"}
        return f"{words[self.harmful.chosen]}>{words[self.harmful.rejected]}"


_CHECKED = TypeAdapter(PairMetadata)


def parse_metadata(raw: bytes | Mapping[str, Any], where: str) -> PairMetadata:
    """Check a `K.json` (its bytes, or the object) and return it.

    Args:
        raw: the bytes of the file, or the parsed object.
        where: the shard and the sample, for messages.

    Raises:
        UserError: names `where`, the field and what it must be.
    """
    data = _load(raw, where) if isinstance(raw, bytes) else raw
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: the metadata must be a JSON object")
    if "images" in data:
        return _group(data, where)
    # Both have a default for code that puts a pair together, but a file must state them.
    return checked(_CHECKED, {"harmful": None, "order": None} | dict(data), where)


def _group(data: Mapping[str, Any], where: str) -> PairMetadata:
    from lit_safety.data.format.ranking import MAX_IMAGES, NEEDED

    if twice := [name for name in BY_IMAGE if name in data]:
        raise UserError(f"{where}: {twice[0]!r} stands beside 'images', which says it of each image: leave it out")
    group = checked(_CHECKED, {"order": None} | dict(data), where)
    if not 2 <= (count := len(group.images)) <= MAX_IMAGES:
        raise UserError(f"{where}: 'images' must hold 2 to {MAX_IMAGES} images, not {count}")
    if group.ranks is None:
        raise UserError(f"{where}: 'images' cannot be ranked by {group.order}, which needs {NEEDED[group.order]}")
    if max(group.ranks) == 0:
        raise UserError(f"{where}: 'images' are all equal by {group.order}, so none is the best: leave the group out")
    best, worst = (group.images[side] for side in group.sides)

    def both(name: str) -> Sides[Any] | None:
        values = getattr(best, name), getattr(worst, name)
        return None if None in values else Sides(*values)

    harmful = Sides(best.harmful, worst.harmful)
    return replace(group, harmful=harmful, cost=both("cost"), score=both("score"))


def _load(raw: bytes, where: str) -> Any:
    if len(raw) > MAX_METADATA_BYTES:
        raise UserError(f"{where}: the metadata is {len(raw)} bytes, over the limit of {MAX_METADATA_BYTES}")
    try:
        return load_json(decode_text(raw, f"{where}: json"))
    except NotUtf8:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the metadata is not JSON ({error})") from error
