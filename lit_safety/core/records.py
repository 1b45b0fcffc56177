"""JSON records of other people, checked by pydantic, with what is wrong in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, StrictStr, TypeAdapter, ValidationError

from lit_safety.core.errors import UserError

T = TypeVar("T")


def _encodable(text: str) -> str:
    """Refuse half a surrogate pair: JSON can hold it, but UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds a broken character at {error.start}") from error
    return text


#: The types of fields. A number must be finite; a text, true and false are not numbers.
Text = Annotated[StrictStr, AfterValidator(_encodable)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


#: pydantic's word for an error -> our words about the field.
_WORDS = {
    "missing": "is missing",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "dataclass_type": "must be an object",
}


def checked(kind: TypeAdapter[T], data: Mapping[str, Any], where: str) -> T:
    """The record that a JSON object holds.

    Args:
        kind: what it must be.
        data: the object.
        where: the file and the record, for messages.

    Raises:
        UserError: names ``where``, the first wrong field and what it must be.
    """
    try:
        return kind.validate_python(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise UserError(f"{where}: unknown field {name!r}") from error
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if first["type"] == "literal_error":
            said = f"must be one of {first['ctx']['expected'].replace(' or ', ', ')}"
        said = _WORDS.get(first["type"], said)
        value = "" if first["type"] == "missing" else f", not {repr(first['input'])[:80]}"
        raise UserError(f"{where}: {name!r} {said}{value}") from error
