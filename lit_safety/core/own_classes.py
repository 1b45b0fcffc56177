"""A user's own class that YAML names: what it lacks, in words that say what to write."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from jsonargparse._util import import_object


def methods(protocol: type) -> Iterator[str]:
    """The names of a protocol's methods."""
    for name, _ in inspect.getmembers(protocol, inspect.isfunction):
        if not name.startswith("_"):
            yield name


def lacking(value: object, protocol: type) -> str | None:
    """Which of a protocol's methods a class lacks; None: it can be called as the protocol says.

    Annotations may be missing, and parameters may have other names. A return type that is written must be the right
    one.
    """
    kind = protocol.__name__
    _lacking_of[kind] = protocol
    if not inspect.isclass(value):
        how = f"a class with `{signature(protocol, next(methods(protocol)))}`"
        return f"is not a class, and a {kind} is {how}"
    for name in methods(protocol):
        wanted = signature(protocol, name)
        own = inspect.getattr_static(value, name, None)
        if own is None:
            return f"has no method `{name}`: a {kind} has `{wanted}`"
        if not callable(getattr(value, name)):
            return f"has a `{name}` that is not a method: a {kind} has `{wanted}`"
        bound = not isinstance(own, staticmethod | classmethod)
        given = list(inspect.signature(getattr(protocol, name)).parameters)[1:]
        try:
            inspect.signature(getattr(value, name)).bind(*([None] if bound else []), *given)
        except TypeError as error:
            return f"has `{signature(value, name)}`, which cannot be called as `{name}({', '.join(given)})` ({error})"
        except ValueError:  # a class in C
            continue
        names = list(inspect.signature(getattr(value, name)).parameters)[1 if bound else 0 :]
        if names[: len(given)] != given and sorted(names[: len(given)]) == sorted(given):
            return f"has `{signature(value, name)}` and is called as `{name}({', '.join(given)})`: swap its parameters"
        if (other := _returns_another(getattr(value, name), getattr(protocol, name))) is not None:
            return f"has a `{name}` that returns {other}: a {kind} has `{wanted}`"
    return None


def attributes_lacking(made: object, protocol: type) -> str | None:
    """Which of a protocol's attributes an object lacks, such as a judge's `settings`; None: it has them."""
    types = {"str": str, "dict[str, Any]": dict}
    for name, written in protocol.__annotations__.items():
        wanted = f"a {protocol.__name__} sets `self.{name}: {written}` when it is made"
        if not hasattr(made, name):
            return f"has no `{name}`: {wanted}"
        expected = types.get(str(written))
        if expected is not None and not isinstance(getattr(made, name), expected):
            return f"has a `{name}` that is {type(getattr(made, name)).__name__}: {wanted}"
    return None


def signature(owner: object, name: str) -> str:
    """`judge(self, images: Sequence[Image]) -> list[Verdict]`."""
    try:
        return f"{name}{inspect.signature(getattr(owner, name))}".replace("'", "")
    except (TypeError, ValueError):
        return name


def abstract_methods(kind: type) -> list[str]:
    """What an abstract class must still define, as its base writes it."""
    return [signature(kind, name) for name in sorted(getattr(kind, "__abstractmethods__", ()))]


def _returns_another(own: Any, asked: Any) -> str | None:
    """The return type that a method states, if it cannot be the one that is asked for."""
    stated, wanted = _return_type(own), _return_type(asked)
    origin = typing.get_origin(stated) or stated
    expected = typing.get_origin(wanted) or wanted
    if not inspect.isclass(origin) or not inspect.isclass(expected) or origin is object:
        return str(stated) if stated is type(None) and inspect.isclass(expected) else None
    fits = issubclass(origin, expected) or issubclass(expected, origin)
    return None if fits else getattr(stated, "__name__", str(stated))


def _return_type(method: Any) -> Any:
    """What a method says it returns; None: it does not say."""
    written = inspect.signature(method).return_annotation
    if isinstance(written, str):
        # Of `list[Verdict]` only the `list` is compared: the type in brackets may not be imported here.
        return {"list": list, "tuple": tuple, "dict": dict, "set": set, "str": str, "bool": bool, "int": int,
                "float": float, "None": type(None)}.get(written.partition("[")[0].strip())  # fmt: skip
    return type(None) if written is None else None if written is inspect.Signature.empty else written


# The same from a message of jsonargparse, which names neither methods nor bases.

_lacking_of: dict[str, type] = {}
"""The protocols that were checked, by name."""
_LACKS = re.compile(r"Import path (\S+) does not implement protocol (\w+)")
_NO_SUBCLASS = re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)")
_NAMED = re.compile(r"Expected a path but (\S+) either not accessible")
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (\S+) is abstract")
_UNTYPED = re.compile(r"Parameter '(\w+)' from '(\S+?)(?:\.__init__)?' does not specify a type")

_BASES = {
    "Objective": "lit_safety.objectives.Objective",
    "Guard": "lit_safety.guards.Guard",
    "Attack": "lit_safety.attacks.Attack",
    "LightningModule": "lit_safety.modules.PreferenceModule",
    "LightningDataModule": "lightning.pytorch.LightningDataModule",
    "Callback": "lightning.pytorch.callbacks.Callback",
}
"""The base of a user's own class, for messages."""


def what_to_write(reason: str, message: str) -> str | None:
    """What to write into a class that does not fit its key, from jsonargparse's reason.

    Args:
        reason: a line of its message.
        message: the whole message.

    Returns: None if something else is wrong.
    """
    if (found := _LACKS.search(reason)) is not None:
        with suppress(ImportError, AttributeError, ValueError, TypeError):
            value, protocol = import_object(found[1]), _lacking_of.get(found[2])
            if protocol is not None and (lack := lacking(value, protocol)) is not None:
                return f"{found[1]} {lack}"
    if (found := _NO_SUBCLASS.search(reason)) is not None:
        named = _NAMED.search(message)  # jsonargparse also tries a class name alone as a file name
        name = found[1] or (named[1] if named is not None else "it")
        return f"{name} is not a subclass of {found[2]}: write `class ...({_BASES.get(found[2], found[2])})`"
    if (found := _ABSTRACT.search(reason)) is not None:
        with suppress(ImportError, AttributeError, ValueError):
            missing = "`, `".join(abstract_methods(import_object(found[1])))
            return f"{found[1]} does not define `{missing}`"
    if (found := _UNTYPED.search(reason)) is not None:
        return (
            f"`{found[1]}` of {found[2]} needs a type, so that YAML can be read: write one, such as `{found[1]}: float`"
        )
    return None
