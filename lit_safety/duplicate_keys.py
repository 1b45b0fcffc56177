"""Finds keys that stand twice in a mapping, of which YAML and JSON readers silently keep the last."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

from lit_safety.errors import UserError


def refuse_duplicate_keys(content: bytes | str) -> None:
    """Complain about a YAML text in which a key stands twice in one mapping.

    Raises:
        UserError: there is one; the message names the key and both lines.
        yaml.YAMLError: it is no YAML.
    """
    left = [yaml.compose(content, Loader=yaml.SafeLoader)]
    seen: set[int] = set()
    while left:
        node = left.pop()
        if id(node) in seen:  # an alias stands for a node that stands elsewhere
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse(node)
            left += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def strict_json(content: str | bytes, finite: bool = True) -> Any:
    """`json.loads`, but of a file that means one thing only, and holds numbers.

    Args:
        content: the text.
        finite: refuse nan and infinity, which Python and pandas write, and which no JSON may hold.

    Raises:
        ValueError: it is no JSON, a key stands twice in an object, or a number is not finite.
        RecursionError: it is too deep.
    """
    numbers: dict[str, Any] = {"parse_constant": _constant, "parse_float": _number} if finite else {}
    return json.loads(content, object_pairs_hook=_object, **numbers)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key `{twice}` stands twice in one object; keep one")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:40]}, which is too large a number")
    return number


def _refuse(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"the key `{key.value}` stands twice, in lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line
