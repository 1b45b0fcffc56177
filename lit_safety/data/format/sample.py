"""One preference pair's metadata: what stands in `K.json` of a shard.

The file is data from somewhere else: every field is checked and nothing in it is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.text import NotUtf8, decode_text, load_json

PROMPT_KINDS: tuple[str, ...] = ("harmful", "clean")
ORDERS: tuple[str, ...] = ("safety", "quality", "composite")
SIDES: tuple[str, ...] = ("chosen", "rejected")
MAX_METADATA_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Sides(Generic[T]):
    """A value for each image of the pair."""

    chosen: T
    rejected: T

    def to_dict(self) -> dict[str, T]:
        return {"chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class PairMetadata:
    """What is known of a pair besides its two images."""

    prompt: str
    """The text both images were made for; never empty."""
    prompt_kind: str
    """`harmful`: the prompt asks for harm; `clean`: it does not."""
    order: str = "safety"
    """What decided which image is chosen: `safety`, `quality` or `composite` (a user's bounds, or both)."""
    categories: tuple[str, ...] = ()
    """Canonical ids of the harm categories this pair is about; may hold several or none."""
    harmful: Sides[bool | None] = Sides(None, None)
    """Labels (never a model's output): is the image harmful? None: not known."""
    concept: str | None = None
    """The asked concept within the category, such as `gun`."""
    cost: Sides[float] | None = None
    """A cost model's values; above 0 is harmful."""
    score: Sides[float] | None = None
    """Quality; higher is better."""
    user_id: str | None = None
    """Whose preference this is; None: everyone's."""
    source: str | None = None
    """Where the pair comes from (a data set and its row)."""
    seed: int | None = None
    """The seed both images were drawn with, where they share one."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `K.json`, without the fields that are not set."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
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
        """`"safe>harmful"`: the labels of chosen and rejected in one word, for counting."""
        words = {True: "harmful", False: "safe", None: "unknown"}
        return f"{words[self.harmful.chosen]}>{words[self.harmful.rejected]}"


_KNOWN: frozenset[str] = frozenset(field.name for field in fields(PairMetadata))


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
    if unknown := sorted(set(map(str, data)) - _KNOWN):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(_KNOWN))}")
    prompt = data.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: 'prompt' must be a text that is not empty")
    _encodable(prompt, "prompt", where)
    return PairMetadata(
        prompt=prompt,
        prompt_kind=_one_of(data, "prompt_kind", PROMPT_KINDS, where),
        order=_one_of(data, "order", ORDERS, where),
        categories=_categories(data.get("categories", ()), where),
        harmful=_labels(data.get("harmful"), where),
        concept=_text(data, "concept", where),
        cost=_numbers(data.get("cost"), "cost", where),
        score=_numbers(data.get("score"), "score", where),
        user_id=_text(data, "user_id", where),
        source=_text(data, "source", where),
        seed=_integer(data.get("seed"), "seed", where),
    )


def _load(raw: bytes, where: str) -> Any:
    if len(raw) > MAX_METADATA_BYTES:
        raise UserError(f"{where}: the metadata is {len(raw)} bytes, over the limit of {MAX_METADATA_BYTES}")
    try:
        return load_json(decode_text(raw, f"{where}: json"))
    except NotUtf8:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the metadata is not JSON ({error})") from error


def _one_of(data: Mapping[str, Any], name: str, allowed: tuple[str, ...], where: str) -> str:
    value = data.get(name)
    if value not in allowed or not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _text(data: Mapping[str, Any], name: str, where: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be a text, not {value!r}")
    _encodable(value or "", name, where)
    return value


def _encodable(text: str, name: str, where: str) -> None:
    """Half a surrogate pair can stand in JSON, and in no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name!r} holds a broken character at {error.start}") from error


def _integer(value: Any, name: str, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{where}: {name!r} must be a whole number, not {value!r}")
    return value


def _categories(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise UserError(f"{where}: 'categories' must be a list of category ids, not {value!r}")
    try:
        return tuple(dict.fromkeys(canonical_category(name) for name in value))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _sides(value: Any, name: str, where: str) -> tuple[Any, Any]:
    if isinstance(value, Sides):
        return value.chosen, value.rejected
    if not isinstance(value, Mapping) or set(value) != set(SIDES):
        raise UserError(f"{where}: {name!r} must be an object with 'chosen' and 'rejected', not {value!r}")
    return value["chosen"], value["rejected"]


def _labels(value: Any, where: str) -> Sides[bool | None]:
    chosen, rejected = _sides(value, "harmful", where)
    for side in (chosen, rejected):
        if side is not None and not isinstance(side, bool):
            raise UserError(f"{where}: 'harmful' holds {side!r}; a label is true, false or null")
    return Sides(chosen, rejected)


def _numbers(value: Any, name: str, where: str) -> Sides[float] | None:
    if value is None:
        return None
    pair = []
    for side in _sides(value, name, where):
        try:
            number = math.nan if isinstance(side, bool) or not isinstance(side, int | float) else float(side)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise UserError(f"{where}: {name!r} holds {repr(side)[:40]}, not a finite number")
        pair.append(number)
    return Sides(pair[0], pair[1])
