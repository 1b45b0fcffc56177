"""Command lines whose mistakes are reported in one clear line. Works without torch."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import jsonargparse._postponed_annotations as postponed
import jsonargparse._typehints as typehints
import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._paths import Path
from jsonargparse._util import import_object

from lit_safety.core.errors import UserError
from lit_safety.core.processes import is_main_process
from lit_safety.core.shipped import find_configs
from lit_safety.core.text import check_values, check_words, check_yaml, read_text, refuse_duplicate_keys

_read_by_locale = Path.read_text


def _read_config(self: Path) -> str:
    """A config, or a part of it in its own file. jsonargparse would read it in the machine's encoding."""
    local = not (self.is_url or self.is_fsspec or str(self) == "-")
    return read_text(self.absolute) if local else _read_by_locale(self)


Path.read_text = _read_config  # type: ignore[method-assign]

_run_type_blocks = postponed.update_module_global_vars
_get_types = postponed.get_types


def _only_what_is_there(module: str, global_vars: dict[str, Any], logger: logging.Logger | None) -> None:
    """Replaces jsonargparse's own, which also runs a module's `if TYPE_CHECKING:` blocks, and so imports torch."""
    for name, value in vars(sys.modules[module]).items():
        global_vars.setdefault(name, value)


def _types_at_hand_first(obj: Any, logger: logging.Logger | None = None, parent: Any = None) -> dict[str, Any]:
    """The types of a function's or class's parameters. Type-only imports are run only for types that need them."""
    postponed.update_module_global_vars = _only_what_is_there
    try:
        types = cast(dict[str, Any], _get_types(obj, logger, parent))
    except (NameError, TypeError, AttributeError):
        types = {"": NameError()}
    finally:
        postponed.update_module_global_vars = _run_type_blocks
    given = inspect.signature(obj).parameters if callable(obj) else types
    if any(isinstance(one, Exception) for name, one in types.items() if name in given or not name):
        return cast(dict[str, Any], _get_types(obj, logger, parent))
    return types


postponed.get_types = _types_at_hand_first


_implements_exactly = typehints.implements_protocol


def _implements_protocol(value: Any, protocol: Any) -> bool:
    """Replaces jsonargparse's own, which demands exactly the protocol's annotations. Being callable is enough."""
    if _implements_exactly(value, protocol):
        return True
    if not typehints.is_protocol(protocol) or value is object or protocol.__module__.partition(".")[0] != "lit_safety":
        return False
    from lit_safety.core.own_classes import lacking

    return lacking(value, protocol) is None


typehints.implements_protocol = _implements_protocol


# Lines of jsonargparse's messages that describe its search through a union's types, not the mistake itself.
_SEARCH = re.compile(
    r"Parser key |Does not validate against any|Subtypes:|Errors:$|Given value|Expected a <class 'NoneType'>"
)


def shorten(message: str) -> str:
    """One line from jsonargparse's report: the YAML key and what is wrong with its value.

    jsonargparse reports every type that it tried for every key on the way down. A person needs the keys on the way and
    the innermost reasons.
    """
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    reasons = [line for line in dict.fromkeys(lines) if line and not _SEARCH.match(line)]
    if not reasons:
        return " ".join(message.split())
    # The path was tried as a class and as a file. The message that the class has moved is enough.
    reasons = [line for line in reasons if "since version 0.2" in line] or reasons
    from lit_safety.core.own_classes import what_to_write

    own = [said for line in reasons if (said := what_to_write(line, message)) is not None]
    reasons = own or reasons  # then the other types that were tried do not matter
    if keys:
        keys += _below(message)
    where = [f"`{'.init_args.'.join(keys)}`:"] if keys else []
    if (missing := _missing_package(" ".join(reasons))) is not None:
        reasons = [missing]
    return " ".join(" ".join([*where, *reasons]).split())


def _missing_package(reason: str) -> str | None:
    """What to install for a class whose package is missing; None: it is another error."""
    package = re.search(r"No module named '(\w+)'", reason)
    given = re.search(r"class_path=?\W+([\w.]+)", reason)
    if package is None or given is None or given[1].partition(".")[0] != package[1]:
        return None
    from lit_safety.core.meant import no_package

    return no_package(given[1])


def _below(message: str) -> list[str]:
    """Keys below the last one that jsonargparse names, on the way to an option that is not accepted.

    It does not name a key whose value is a class that is made later (an optimizer, a scheduler). Only the whole value
    in its message shows where the option stood.
    """
    option = re.search(r"Option '([^']+)' is not accepted", message)
    if option is None:
        return []
    dotted = re.search(rf"NestedArg\(key='([^']+)\.{re.escape(option[1])}'", message)
    if dotted is not None:
        return [key for key in dotted[1].split(".") if key != "init_args"]
    for given in re.findall(r"Given value: (\{.*\})", message):
        try:
            way = _way(ast.literal_eval(given), option[1])
        except (ValueError, SyntaxError):
            continue
        if way is not None:
            return [key for key in way if key != "init_args"]
    return []


def _way(value: object, option: str) -> list[str] | None:
    """The keys that lead to the mapping in which ``option`` stands."""
    if not isinstance(value, dict):
        return None
    if option in value:
        return []
    for key, inner in value.items():
        if (way := _way(inner, option)) is not None:
            return [str(key), *way]
    return None


@dataclass
class _Changes:
    """Arguments that were dropped because another class was named, noted while a parser reads."""

    inherits: tuple[type, ...]
    said: dict[tuple[str, str], str] = field(default_factory=dict)
    """(class before, class now) -> the note about it."""

    def note(self, before: str, now: str, dropped: Mapping[str, Any]) -> None:
        """Remember what was dropped. Only the first time: later it would be the arguments of a parameter's default."""
        told = ", ".join(f"{key}: {_brief(one)}" for key, one in dropped.items())
        text = f"{now} instead of {before} starts from its own defaults; not taken over: {told}"
        if dropped:
            self.said.setdefault((before, now), text)

    def tell(self) -> None:
        """Print what was noted, on stderr, where --print_config writes no YAML."""
        for text in self.said.values() if is_main_process() else ():
            print(f"note    {text}", file=sys.stderr)


_changes: ContextVar[_Changes | None] = ContextVar("changes", default=None)
_keep_what_fits: Callable[..., None] = typehints.discard_init_args_on_class_path_change


def _begin_from_own_defaults(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Replaces jsonargparse's rule, by which a class takes over every argument that the class before it also has.

    By that rule `beta: 100` of one loss becomes the beta of another, without a note. Here a changed class takes over
    only required arguments, such as a logger's folder. Exceptions: the same class by another path, and a subclass of a
    class in `inherits`.
    """
    changes = _changes.get()
    if changes is not None and _changed(prev_val, value, changes.inherits):
        needed = _without_default(value["class_path"])
        arguments = prev_val["init_args"]
        given = dict(arguments.items(branches=True, nested=False)) if isinstance(arguments, Namespace) else arguments
        dropped = {key: one for key, one in given.items() if key not in needed}
        for key in dropped:
            arguments.pop(key)
        changes.note(prev_val["class_path"], value["class_path"], dropped)
    _keep_what_fits(parser_or_action, prev_val, value)


def _changed(prev_val: Any, value: Any, inherits: tuple[type, ...]) -> bool:
    if not isinstance(prev_val, Namespace | dict) or not prev_val.get("init_args"):
        return False
    before, after = prev_val["class_path"], value["class_path"]
    if before == after:
        return False
    try:
        old, new = import_object(before), import_object(after)
    except (ImportError, AttributeError, ValueError):
        return True
    if old is new:
        return False
    both = isinstance(old, type) and isinstance(new, type)
    return not (both and issubclass(new, old) and issubclass(old, inherits))


def _without_default(class_path: str) -> set[str]:
    try:
        parameters = inspect.signature(import_object(class_path)).parameters.values()
    except (TypeError, ValueError):  # a class in C
        return set()
    return {one.name for one in parameters if one.default is one.empty}


def check_nulls(values: Any, key: str = "") -> None:
    """Refuse a null in a config for a class's parameter that cannot be null.

    jsonargparse accepts it in files, and the class would then fail with a message that does not name the key. Only
    plain types are checked. A parameter whose default is null accepts null, whatever its type says.

    Raises:
        UserError: names the key.
    """
    if isinstance(values, list | tuple):
        for number, one in enumerate(values):
            check_nulls(one, f"{key}.{number}")
    if not isinstance(values, Mapping):
        return
    arguments = values.get("init_args")
    if isinstance(values.get("class_path"), str) and isinstance(arguments, Mapping):
        empty = {name for name, one in arguments.items() if one is None}
        for parameter in _parameters(values["class_path"]) if empty else ():
            if parameter.name in empty and parameter.default is not None and parameter.annotation in _PLAIN:
                raise UserError(
                    f"`{key}.init_args.{parameter.name}`: is null, and {values['class_path'].rpartition('.')[2]} needs "
                    f"a {parameter.annotation.__name__}"
                )
    for name, one in values.items():
        check_nulls(one, f"{key}.{name}" if key else str(name))


_PLAIN = (int, float, bool, str)


def _parameters(class_path: str) -> Sequence[Any]:
    try:
        return get_signature_parameters(typehints.import_object(class_path), "__init__")
    except (ImportError, AttributeError, TypeError, ValueError):  # not a class, or a class in C
        return ()


def _brief(value: Any) -> str:
    return str(value["class_path"]) if isinstance(value, Namespace) and "class_path" in value else str(value)[:60]


typehints.discard_init_args_on_class_path_change = _begin_from_own_defaults


_load = get_loader("yaml")


def _load_strictly(content: str, path: object = "") -> Any:
    """jsonargparse's YAML reader with the bounds of `bounded`. A key that stands twice is refused; YAML would keep the
    last one."""
    where = str(path) or content[:80]
    check_yaml(content, where)
    if _changes.get() is not None and ("\n" in content or "{" in content):
        try:
            refuse_duplicate_keys(content)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        return _load(content)
    except (ValueError, OverflowError, RecursionError) as error:  # an impossible date, a number of 10^5 digits
        raise yaml.YAMLError(f"holds a value that cannot be read ({str(error)[:100]})") from error


set_loader("yaml", _load_strictly, (yaml.YAMLError,))


_CLASS = re.compile(r"(?!(?:null|true|false)$)[A-Za-z_][\w.]*$", re.IGNORECASE)


def classes_first(arguments: Sequence[str]) -> list[str]:
    """Options that name a class are moved to the left, before the options of that class.

    `--loss.beta 3 --loss Hinge` must mean the same as `--loss Hinge --loss.beta 3`: without this the beta would go to
    the class before. Options are not moved over a `--config`.
    """
    groups: list[list[str]] = []
    for word in arguments:
        if not groups or re.match(r"--?[A-Za-z]", word):
            groups.append([word])
        else:
            groups[-1].append(word)
    done: list[list[str]] = []
    for group in groups:
        name, _, value = (group[0] if "=" in group[0] or len(group) < 2 else "=".join(group[:2])).partition("=")
        key = _plain(name).removesuffix(".class_path")
        index = len(done)
        if name.startswith("--") and _CLASS.match(value):
            for i in range(len(done) - 1, -1, -1):
                other = _plain(done[i][0].partition("=")[0])
                if other in ("--config", "-c"):
                    break
                if other.startswith(f"{key}.") and other != f"{key}.class_path":
                    index = i
        done.insert(index, group)
    return [word for group in done for word in group]


def _plain(option: str) -> str:
    return option.replace(".init_args", "")


class SingleLineErrors:
    """Mixin for parsers: a parsing error becomes a `UserError` of one line instead of usage and traceback.

    And a class that is named instead of another one starts from its own defaults; dropped arguments are printed.
    """

    inherits: tuple[type, ...] = ()
    """A subclass of one of these classes, named instead of it, keeps the arguments that were given for it."""

    def parse_args(self, args: Any = None, *more: Any, **keys: Any) -> Any:
        with self._fresh():
            given = sys.argv[1:] if args is None else args
            if isinstance(given, list | tuple) and all(isinstance(word, str) for word in given):
                check_words(list(given))
                given = classes_first(find_configs(given))
            parsed = super().parse_args(given, *more, **keys)  # type: ignore[misc]
            check_values(parsed.as_dict())
            check_nulls(parsed.as_dict())
            return parsed

    def parse_object(self, *given: Any, **keys: Any) -> Any:
        with self._fresh():
            parsed = super().parse_object(*given, **keys)  # type: ignore[misc]
            check_values(parsed.as_dict())
            check_nulls(parsed.as_dict())
            return parsed

    def instantiate(self, *given: Any, **keys: Any) -> Any:
        """As jsonargparse's own, but a class's own message about its arguments is kept.

        If a type is `X | None`, jsonargparse turns that message into a `ValueError` about all allowed types.
        """
        try:
            return super().instantiate(*given, **keys)  # type: ignore[misc]
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            if cause is None or isinstance(error, UserError):
                raise
            raise UserError(str(cause)) from error

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """Applies the rule; the outermost parser prints what was not taken over."""
        if _changes.get() is not None:
            yield
            return
        changes = _Changes(self.inherits)
        token = _changes.set(changes)
        try:
            yield
        except SystemExit:  # --print_config
            changes.tell()
            raise
        finally:
            _changes.reset(token)
        changes.tell()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Messages of nested parsers come back here inside the outer message. Only the outermost is shortened, by the
        # command line, so that all keys on the way are kept.
        from lit_safety.core.meant import meant

        raise UserError(f"{message}{meant(str(message), self)}") from ex

    def parse_path(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """As jsonargparse's own, but a file that does not hold a config is named."""
        try:
            with self._fresh():
                return cast(Any, super()).parse_path(path, *arguments, **options)
        except UserError as error:
            said = str(error)
            if said.startswith("Unexpected config:"):
                raise UserError(f"{path}: is empty, or does not hold keys with values") from error
            if said.startswith("Problems parsing config:"):
                raise UserError(f"{path}: is not YAML ({said.partition(':')[2].strip()})") from error
            raise


class SingleLineErrorParser(SingleLineErrors, ArgumentParser):
    """jsonargparse's parser with one-line errors."""
