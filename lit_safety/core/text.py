"""All text that people write is read here: configs, tables, prompts, templates. UTF-8, with or without a mark.

A file in another encoding is refused. The encoding is not guessed: a wrong guess would change prompts without an error,
and Python's own choice depends on the machine.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError

_MARKS = {  # UTF-32 begins as UTF-16 does, so it is tested first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class NotUtf8(UserError, ValueError):
    """A text in another encoding. It is also a ValueError, because some code tries several readers in turn."""


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without the mark that may stand in front.

    Args:
        data: the whole file.
        where: its name, for messages.

    Raises:
        NotUtf8: it is in another encoding; the message names the file, the first such place, and how to convert it.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise NotUtf8(f"{where}: is {name}, and only UTF-8 is read; {_advice(name)}")
    if data[:4096].count(0) > len(data[:4096]) // 4:  # plain letters in UTF-16 are every other byte 0
        raise NotUtf8(
            f"{where}: looks like UTF-16 without a mark (every other byte is 0), and only UTF-8 is read; "
            f"{_advice('UTF-16LE')}"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotUtf8(
            f"{where}: is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); {_advice('WINDOWS-1252')} if that "
            "is what it is"
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        NotUtf8: it is in another encoding.
    """
    return decode_text(Path(path).read_bytes(), str(path))


def _advice(encoding: str) -> str:
    return f"save it as UTF-8, as `iconv -f {encoding} -t UTF-8` does"


# YAML and JSON of other people, and things that are not files: reading is bounded, or refused in one line.
#
# An alias in YAML stands for a whole subtree: a few lines of aliases of aliases can stand for more values than fit in
# memory. Deeply nested brackets overflow Python's stack. JSON has only the second problem.


DEPTH = 100
"""How deep mappings and lists may be nested."""
ALIASED = 20_000
"""How many values aliases may add to those that are written out."""
ENTRIES = 100_000
"""How many names in a folder are checked for something that is not a file."""


def check_yaml(text: str | bytes, where: str = "") -> None:
    """Refuse a YAML text that is nested too deeply, or whose aliases stand for too much.

    Args:
        text: the YAML.
        where: the file, for the message.

    Raises:
        UserError: it is.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) < 2 * DEPTH:  # most often a number or a word of a command line
        return
    import yaml

    prefix = f"{where}: " if where else ""
    anchors: dict[str, int] = {}
    open_nodes: list[tuple[int, str | None]] = []
    size = written = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((size, event.anchor))
            size, written = size + 1, written + 1
            if len(open_nodes) > DEPTH:
                raise UserError(f"{prefix}more than {DEPTH} lists or mappings are nested; flatten it")
        elif isinstance(event, yaml.CollectionEndEvent):
            before, anchor = open_nodes.pop()
            if anchor is not None:
                anchors[anchor] = size - before
        elif isinstance(event, yaml.ScalarEvent):
            size, written = size + 1, written + 1
            if event.anchor is not None:
                anchors[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for _, anchor in open_nodes):
                raise UserError(f"{prefix}the alias *{event.anchor} refers to a part that contains it")
            size, written = size + anchors.get(str(event.anchor), 1), written + 1
        if size > written + ALIASED:
            raise UserError(f"{prefix}its aliases (*name) stand for more than {ALIASED} values; write the values out")


def refuse_duplicate_keys(content: bytes | str) -> None:
    """Refuse a YAML text in which a key stands twice in one mapping.

    Raises:
        UserError: there is such a key (the message names it and both lines), or the text is nested too deeply.
        yaml.YAMLError: it is not YAML.
    """
    import yaml

    check_yaml(content)
    left = [yaml.compose(content, Loader=yaml.SafeLoader)]
    seen: set[int] = set()
    while left:
        node = left.pop()
        if id(node) in seen:  # an alias: its node was seen where it is written out
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse(node)
            left += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def _refuse(mapping: Any) -> None:
    import yaml

    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"the key `{key.value}` stands twice, in lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line


def load_yaml(text: str | bytes, where: str = "", loader: Any = None) -> Any:
    """The content of a YAML text: `yaml.safe_load` with bounds, and a key that stands twice in a mapping is refused.

    Args:
        text: the YAML.
        where: the file, for messages.
        loader: a safe loader; None: PyYAML's.

    Raises:
        UserError: it is nested too deeply, its aliases stand for too much, or a key stands twice.
        yaml.YAMLError: it is not YAML, or holds an impossible value.
    """
    import yaml

    check_yaml(text, where)
    try:
        refuse_duplicate_keys(text)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error
    try:
        return yaml.load(text, Loader=loader or yaml.SafeLoader)
    except (ValueError, OverflowError, RecursionError) as error:  # an impossible date, a number of 10^5 digits
        raise yaml.YAMLError(f"holds a value that cannot be read ({str(error)[:100]})") from error


def load_json(text: str | bytes, finite: bool = True) -> Any:
    """`json.loads`, but keys that stand twice, deep nesting and numbers that are not finite are refused.

    Args:
        text: the JSON.
        finite: refuse nan and infinity, which Python and pandas write although JSON does not allow them.

    Raises:
        ValueError: a key stands twice in an object, or a number is not finite. `json.JSONDecodeError`: it is not JSON,
            or is nested too deeply.
    """
    numbers: dict[str, Any] = {"parse_constant": _constant, "parse_float": _number} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_object, **numbers)
    except RecursionError as error:
        raise json.JSONDecodeError("is nested too deeply", "", 0) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key `{twice}` stands twice in one object; keep one")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON does not allow")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:40]}, which is too large a number")
    return number


def check_words(words: list[str]) -> None:
    """Refuse a FIFO or a device that a command line names, before it is opened: reading it might never end.

    Raises:
        UserError: names the option.
    """
    before = ""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else (before, "=", word)
        if equals:
            refuse_special(option, value)
        before = option if word.startswith("--") and not equals else ""


def check_values(values: Mapping[str, Any]) -> None:
    """The same for all texts of a parsed command line, its config files included, and for files in folders.

    Raises:
        UserError: names the key.
    """
    left: list[tuple[str, Any]] = list(values.items())
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{key}.{name}", one) for name, one in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, one) for one in value]
        elif isinstance(value, str | Path):
            refuse_special(key, str(value))


def refuse_special(key: str, place: str) -> None:
    """Refuse a path that is neither a file nor a folder, or a folder that holds such a thing.

    Args:
        key: the option or YAML key that names it; empty: an argument without a name.
        place: what may be a path.

    Raises:
        UserError: names key and place.
    """
    if not place or len(place) > 4096 or "\0" in place or "\n" in place or place == os.devnull:
        return
    try:
        mode = os.stat(place).st_mode
    except (OSError, ValueError) as error:  # it does not exist, or is not a path
        if getattr(error, "errno", None) != errno.ELOOP:
            return
        raise UserError(f"{key or place}: {place} is a link to itself") from error
    special = _special(place) if stat.S_ISDIR(mode) else () if stat.S_ISREG(mode) else (place,)
    found = next(iter(special), None)
    if found is not None:
        named = f"{key}: " if key and key != place else ""
        raise UserError(f"{named}{found} is neither a file nor a folder (a FIFO, a socket or a device); give a copy")


def _special(folder: str) -> Iterator[str]:
    """The first name in a folder that is not a file, folder or dangling link. Only `ENTRIES` names are checked."""
    left, seen = [folder], 0
    while left:
        try:
            entries = os.scandir(left.pop())
        except OSError:  # the folder may not be read: the code that reads it later reports that
            continue
        with entries:
            for entry in entries:
                seen += 1
                if seen > ENTRIES:
                    return
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                elif not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path):
                    yield entry.path
