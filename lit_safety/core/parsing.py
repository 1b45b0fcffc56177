"""Command lines whose mistakes come out as one clear line. Needs no torch."""

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
    """A config, or a part of one in a file of its own. jsonargparse would take the machine's encoding for it."""
    local = not (self.is_url or self.is_fsspec or str(self) == "-")
    return read_text(self.absolute) if local else _read_by_locale(self)


Path.read_text = _read_config  # type: ignore[method-assign]

_run_type_blocks = postponed.update_module_global_vars
_get_types = postponed.get_types


def _only_what_is_there(module: str, global_vars: dict[str, Any], logger: logging.Logger | None) -> None:
    """Instead of jsonargparse's, which also runs a module's `if TYPE_CHECKING:` blocks, and with them torch."""
    for name, value in vars(sys.modules[module]).items():
        global_vars.setdefault(name, value)


def _types_at_hand_first(obj: Any, logger: logging.Logger | None = None, parent: Any = None) -> dict[str, Any]:
    """The types of a function's or class's parameters; type-only imports are done for those that need them."""
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
    """Instead of jsonargparse's, which asks for the very annotations of the protocol: what can be called will do."""
    if _implements_exactly(value, protocol):
        return True
    if not typehints.is_protocol(protocol) or value is object or protocol.__module__.partition(".")[0] != "lit_safety":
        return False
    from lit_safety.core.own_classes import lacking

    return lacking(value, protocol) is None


typehints.implements_protocol = _implements_protocol


# Lines of jsonargparse's messages that describe its search through a union's types and not the mistake itself.
_SEARCH = re.compile(
    r"Parser key |Does not validate against any|Subtypes:|Errors:$|Given value|Expected a <class 'NoneType'>"
)


def shorten(message: str) -> str:
    """One line out of jsonargparse's report: the YAML key and what is wrong with its value.

    jsonargparse reports every type that it tried for every key on the way down; the keys on the way and the
    innermost reasons are what a person needs.
    """
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    reasons = [line for line in dict.fromkeys(lines) if line and not _SEARCH.match(line)]
    if not reasons:
        return " ".join(message.split())
    # The path was tried as a class and as a file; the message that the class has moved is enough.
    reasons = [line for line in reasons if "since version 0.2" in line] or reasons
    from lit_safety.core.own_classes import what_to_write

    own = [said for line in reasons if (said := what_to_write(line, message)) is not None]
    reasons = own or reasons  # then the other ways in which the value could have been read say nothing
    if keys:
        keys += _below(message)
    where = [f"`{'.init_args.'.join(keys)}`:"] if keys else []
    if (missing := _missing_package(" ".join(reasons))) is not None:
        reasons = [missing]
    return " ".join(" ".join([*where, *reasons]).split())


def _missing_package(reason: str) -> str | None:
    """What to install for a class whose package is missing; None: the error is another one."""
    package = re.search(r"No module named '(\w+)'", reason)
    given = re.search(r"class_path=?\W+([\w.]+)", reason)
    if package is None or given is None or given[1].partition(".")[0] != package[1]:
        return None
    from lit_safety.core.meant import no_package

    return no_package(given[1])


def _below(message: str) -> list[str]:
    """Keys below the last one that jsonargparse names, on the way to an option that is not accepted.

    It names no key whose value is a class that is made later (an optimizer, a scheduler): only the whole value that it
    was given shows where the option stood.
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
    """What a class that was named instead of another one did not take over from it, while a parser reads."""

    inherits: tuple[type, ...]
    said: dict[tuple[str, str], str] = field(default_factory=dict)
    """(class before, class now) -> what is said of it."""

    def note(self, before: str, now: str, dropped: Mapping[str, Any]) -> None:
        """Remember what was dropped; a second time it would be the arguments of a parameter's default."""
        told = ", ".join(f"{key}: {_brief(one)}" for key, one in dropped.items())
        text = f"{now} instead of {before} begins from its own defaults; not taken over: {told}"
        if dropped:
            self.said.setdefault((before, now), text)

    def tell(self) -> None:
        """Print what was noted, on stderr, where --print_config writes no YAML."""
        for text in self.said.values() if is_main_process() else ():
            print(f"note    {text}", file=sys.stderr)


_changes: ContextVar[_Changes | None] = ContextVar("changes", default=None)
_keep_what_fits: Callable[..., None] = typehints.discard_init_args_on_class_path_change


def _begin_from_own_defaults(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Instead of jsonargparse's rule, by which a class takes over every argument of the one before that it also has.

    By that rule `beta: 100` of one loss becomes the beta of another, in silence. Here a changed class takes over
    nothing but what it needs and has no default for, such as a logger's folder. Exceptions: the same class by another
    path, and a subclass of a class in `inherits`.
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
    except (TypeError, ValueError):  # a class of C code
        return set()
    return {one.name for one in parameters if one.default is one.empty}


def check_nulls(values: Any, key: str = "") -> None:
    """Complain about a null of a class in a config whose parameter takes none.

    jsonargparse lets it through in files, and the class would fail on it in words that name no key. Only plain types
    are looked at; a parameter whose default is null takes one whatever its type says.

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
    except (ImportError, AttributeError, TypeError, ValueError):  # no class, or one of C code
        return ()


def _brief(value: Any) -> str:
    return str(value["class_path"]) if isinstance(value, Namespace) and "class_path" in value else str(value)[:60]


typehints.discard_init_args_on_class_path_change = _begin_from_own_defaults


_load = get_loader("yaml")


def _load_strictly(content: str, path: object = "") -> Any:
    """jsonargparse's reader of YAML within the bounds of `bounded`; keys that stand twice, of which YAML keeps the
    last, are refused."""
    where = str(path) or content[:80]
    check_yaml(content, where)
    if _changes.get() is not None and ("\n" in content or "{" in content):
        try:
            refuse_duplicate_keys(content)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        return _load(content)
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, a number of 10^5 digits
        raise yaml.YAMLError(f"holds a value that cannot be read ({str(error)[:100]})") from error


set_loader("yaml", _load_strictly, (yaml.YAMLError,))


_CLASS = re.compile(r"(?!(?:null|true|false)$)[A-Za-z_][\w.]*$", re.IGNORECASE)


def classes_first(arguments: Sequence[str]) -> list[str]:
    """Options that name a class, moved before options of that class that stand further to the left.

    `--loss.beta 3 --loss Hinge` says as much as `--loss Hinge --loss.beta 3`: without this the beta would go to the
    class before. Nothing is moved over a `--config`.
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

    And a class that is named instead of another one begins from its own defaults; what that leaves behind is printed.
    """

    inherits: tuple[type, ...] = ()
    """A subclass of such a class, named instead of it, keeps the arguments that were given for it."""

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
        """As jsonargparse's; what a class says of its arguments comes out as it said it.

        Where a type is `X | None`, jsonargparse turns it into a `ValueError` about all that the type allows.
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
        # Messages of nested parsers come back here inside the outer one's; only the outermost is shortened, by the
        # command line, so that no key on the way is lost.
        from lit_safety.core.meant import meant

        raise UserError(f"{message}{meant(str(message), self)}") from ex

    def parse_path(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """As jsonargparse's; a file that holds no config is named."""
        try:
            with self._fresh():
                return cast(Any, super()).parse_path(path, *arguments, **options)
        except UserError as error:
            said = str(error)
            if said.startswith("Unexpected config:"):
                raise UserError(f"{path}: is empty, or holds something else than keys with values") from error
            if said.startswith("Problems parsing config:"):
                raise UserError(f"{path}: is not YAML ({said.partition(':')[2].strip()})") from error
            raise


class SingleLineErrorParser(SingleLineErrors, ArgumentParser):
    """jsonargparse's parser with one-line errors."""
