"""The keys of YAML files and options, checked against the classes' source before anything heavy is imported.

What is wrong for certain is refused here in a second, with the file and the key that was probably meant. The parser
checks the rest (types, values) once torch is there. `name_file` says which config file of a command line a message is
about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_safety.core.errors import UserError
from lit_safety.core.meant import did_you_mean, no_package
from lit_safety.core.old_names import PACKAGE, explain
from lit_safety.core.shipped import check_is_there, shipped
from lit_safety.core.signatures import Absent, Parameter, Signature, nested, signature_of, values_of
from lit_safety.core.text import check_yaml, load_yaml, read_text, refuse_duplicate_keys

#: command -> where its function is, or subcommand -> function. Strings, so that nothing is imported.
COMMANDS: dict[str, str | dict[str, str]] = {
    "artworld": {
        "build": "lit_safety.worlds.artworld.build:build",
    },
    "attack": "lit_safety.attacks.command:attack",
    "evaluate": "lit_safety.evaluation.command:evaluate",
    "compare": "lit_safety.evaluation.compare:compare",
    "cost-model": "lit_safety.cli.cost_model:check",
    "dossier": "lit_safety.dossier.command:dossier",
    "explain": "lit_safety.dossier.explain:explain",
    "init": "lit_safety.cli.init:init",
    "judge-audit": "lit_safety.evaluation.audit:judge_audit",
    "merge": "lit_safety.merging.merge:merge",
    "patch": "lit_safety.cli.patch:patch",
    "shards": {
        "from-coprov2": "lit_safety.data.convert.coprov2:from_coprov2",
        "from-folder": "lit_safety.data.convert.folder:from_folder",
        "from-pickapic": "lit_safety.data.convert.pickapic:from_pickapic",
        "from-sage": "lit_safety.data.convert.sage:from_sage",
        "generate": "lit_safety.generation.generate:generate",
        "group": "lit_safety.data.convert.group:group",
        "inspect": "lit_safety.data.inspect:inspect",
        "precompute": "lit_safety.cli.precompute:precompute",
        "join": "lit_safety.data.convert.join:join",
        "repair": "lit_safety.generation.repaint:repair",
        "score": "lit_safety.cost_model.score:score",
        "validate": "lit_safety.data.validate:validate",
        "write-prompts": "lit_safety.generation.write_prompts:write_prompts",
    },
    "study": {
        "run": "lit_safety.study.run:run_study",
        "table": "lit_safety.study.table:tabulate",
    },
    "toyworld": {
        "build": "lit_safety.worlds.toyworld.build:build",
        "sheet": "lit_safety.worlds.toyworld.build:sheet",
        "users": "lit_safety.worlds.toyworld.users:write_users_world",
        "flow-twin": "lit_safety.worlds.toyworld.flow_twin:build_flow_twin",
    },
    "users": {
        "embed": "lit_safety.users.embed:embed",
        "evaluate": "lit_safety.evaluation.users.evaluate:evaluate_users",
        "grid": "lit_safety.evaluation.users.grid:grid",
        "sample": "lit_safety.users.profiles:sample",
    },
}
TRAINER = ("fit", "validate", "test", "predict")
#: Keys at the top of a trainer's YAML, besides `trainer`, `model`, `data` and `run`.
TOP = ("config", "seed_everything", "ckpt_path", "weights_only", "verbose")
GROUPS = {"trainer": "lightning.pytorch.Trainer", "run": "lit_safety.cli.run_files.RunOptions"}
CLASSES = ("model", "data")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
_ABOUT_CLASS = {"class_path", "init_args", "dict_kwargs"}


@dataclass
class _State:
    """What was said so far, file after file."""

    classes: dict[str, str] = field(default_factory=dict)
    """Dotted key without `init_args` -> the class that stands there."""
    overlays: dict[str, str] = field(default_factory=dict)
    """`model`, `data` -> the first file with settings of it whose class no file before it names."""


def check_words(words: Sequence[str]) -> None:
    """Check a command line as `check_config` or `check_command` does. An unknown command is not checked.

    Args:
        words: the command and the words after it.

    Raises:
        UserError: as these two functions do.
    """
    command, *rest = words
    if command in TRAINER:
        check_config(rest)
        return
    where = COMMANDS.get(command)
    named = where.get(rest[0]) if isinstance(where, dict) and rest else where
    if isinstance(named, str):
        check_command(named, rest)


def check_config(arguments: Sequence[str]) -> dict[str, str]:
    """Check all keys of a trainer's command line, in the order in which the parser will read them.

    Args:
        arguments: the words after `fit`, `validate`, `test` or `predict`.

    Returns:
        Dotted key without `init_args` -> the class that finally stands there.

    Raises:
        UserError: a file is missing or not YAML, an overlay stands before the method's file, a key is not known, or a
            class cannot be found; names the file or option, the key, and what was probably meant.
    """
    state = _State()
    before: list[tuple[str, Mapping[str, Any]]] = []
    for where, said in _said(arguments):
        nothing_yet = "model" not in state.classes
        _check(said, where, state)
        if nothing_yet and "model" in state.classes and not where.startswith("-"):
            _check_before(before, said, where)
        before.append((where, said))
    if "model" not in state.classes | state.overlays and not any("help" in word for word in arguments):
        raise UserError(
            "no config names a model: give a method's file, as in `--config scdpo.yaml`; "
            "`lit-safety init FOLDER --model MODEL` writes one to edit"
        )
    for key, file in state.overlays.items():
        if key not in state.classes:
            raise UserError(
                f"{file}: does not name `{key}.class_path`, so it is an overlay: put the method's file before it, as "
                f"in `--config scdpo.yaml --config {file}`"
            )
    return state.classes


def check_command(function: str, arguments: Sequence[str]) -> None:
    """As `check_config`, for a command that is a function.

    Args:
        function: `package.module:function`.
        arguments: the words after the command.

    Raises:
        UserError: as `check_config`.
    """
    found, state = signature_of(function.replace(":", ".")), _State()
    for where, said in _said(arguments):
        if found is None:
            continue
        if isinstance(said.get("model"), dict) and "model" not in found.parameters and not where.startswith("-"):
            if function == COMMANDS["evaluate"]:  # `evaluate` takes what it needs from the YAML of a fit
                continue
            raise UserError(f"{where}: is the YAML of a fit, which {found.name} does not read; `evaluate` reads it")
        _keys({key: value for key, value in said.items() if key != "config"}, found, "", where, state)


def _said(arguments: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every config file and every option with its content, in the order of the command line."""
    for option, value in _options(arguments):
        if option in ("--config", "-c"):
            if value is not None:
                yield value, _read(value)
        elif option.startswith("--") and not re.search(r"help|print_config", option):
            key = option.removeprefix("--").removesuffix("+")
            if value is not None and key:
                yield option, _at(key.split("."), _value(value))


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    left = list(arguments)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if not option.startswith("-"):
            continue
        if not equals and left and not re.match(r"--?[A-Za-z]", left[0]):
            yield option, left.pop(0)
        else:
            yield option, value if equals else None


def _at(way: Sequence[str], value: Any) -> dict[str, Any]:
    nested_in: dict[str, Any] = {way[-1]: value}
    for key in reversed(way[:-1]):
        nested_in = {key: nested_in}
    return nested_in


def _value(text: str) -> Any:
    if not text.startswith(("{", "[")):
        return text
    try:
        check_yaml(text)
        return load_yaml(text)
    except (UserError, ValueError, RecursionError, yaml.YAMLError):
        return text


def _read(config: str) -> Mapping[str, Any]:
    """The content of a config; empty if it is not a file, because the parser also takes YAML text.

    Raises:
        UserError: it is missing, or not YAML.
    """
    if "\n" in config or "{" in config or "://" in config or config == "-":
        return {}
    file = Path(shipped(config))
    check_is_there(config)
    try:
        text = read_text(file)
        check_yaml(text, str(config))
        refuse_duplicate_keys(text)
        said = load_yaml(text, str(config))
    except OSError as error:
        raise UserError(f"{config}: cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{config}: {error}") from error
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{config}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(said, dict):
        raise UserError(f"{config}: is empty, or does not hold keys with values")
    return {str(key): value for key, value in said.items()}


# ---- checks of one file, or of one option


def _check(said: Mapping[str, Any], where: str, state: _State) -> None:
    for name, value in said.items():
        key = name.removesuffix("+")
        if key in GROUPS:
            if isinstance(value, dict) and (found := signature_of(GROUPS[key])) is not None:
                _keys(value, found, key, where, state)
        elif key in CLASSES:
            before = state.classes.get(key)
            _class(value, key, None, where, state)
            _check_order(key, value, where, before, state)
        elif key not in TOP and not key.startswith("_"):
            raise UserError(f"{where}: Option {key!r} is not accepted{did_you_mean(key, [*GROUPS, *CLASSES, *TOP])}")


def _check_order(key: str, value: Any, where: str, before: str | None, state: _State) -> None:
    """Refuse an overlay that stands before the file that names the method."""
    is_file = not where.startswith("-")
    if key not in state.classes:
        if isinstance(value, dict) and is_file:
            state.overlays.setdefault(key, where)
    elif before is None and (first := state.overlays.pop(key, None)) is not None and is_file:
        raise _undone(first, where)


def _check_before(before: Sequence[tuple[str, Mapping[str, Any]]], said: Mapping[str, Any], where: str) -> None:
    """Refuse a method's file that undoes trainer or run settings of files before it."""
    for first, earlier in before:
        if not first.startswith("-") and (key := _other_value(earlier, said)) is not None:
            raise _undone(first, where, f" (`{key}`)")


def _undone(first: str, where: str, what: str = "") -> UserError:
    return UserError(
        f"{first}: is an overlay and stands before the method's file {where}, which would undo it{what}: put the "
        f"method's file first, `--config {where} --config {first}`"
    )


def _other_value(first: Any, then: Any, key: str = "") -> str | None:
    """The first dotted key to which both give a value, if the values differ."""
    if not isinstance(first, dict) or not isinstance(then, dict):
        return None if first == then else key
    found = (_other_value(first[name], then[name], f"{key}.{name}" if key else name) for name in first if name in then)
    return next(filter(None, found), None)


def _keys(said: Mapping[str, Any], of: Signature, key: str, where: str, state: _State) -> None:
    for name, value in said.items():
        plain = str(name).removesuffix("+")
        parameter = of.parameters.get(plain)
        if parameter is None:
            if not of.open and "." not in plain:
                place = f"`{_dotted(key, state)}`: " if key else ""
                raise UserError(
                    f"{where}: {place}Option {plain!r} is not accepted by {of.name}{did_you_mean(plain, of.parameters)}"
                )
            continue
        _class(value, f"{key}.{plain}" if key else plain, parameter, where, state)


def _dotted(key: str, state: _State) -> str:
    """A key as it stands in YAML, with `init_args` below a class."""
    way: list[str] = []
    for n, part in enumerate(parts := key.split("."), 1):
        way.append(part)
        if n < len(parts) and (".".join(parts[:n]) in state.classes):
            way.append("init_args")
    return ".".join(way)


def _class(value: Any, key: str, parameter: Parameter | None, where: str, state: _State) -> None:
    """A value that may be a class with its arguments, a dataclass's fields, a list of these, or anything else."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            if isinstance(one, dict) and "class_path" in one:
                _class(one, f"{key}.{number}", None, where, state)
        return
    if isinstance(value, str):
        certain = key in CLASSES or key in state.classes
        if _CLASS.match(value) and (certain or not (parameter is None or "str" in parameter.type)):
            _change(key, value, where, state, certain)
        elif key not in CLASSES:
            state.classes.pop(key, None)
        return
    if not isinstance(value, dict):
        return
    named = value.get("class_path")
    if isinstance(named, str) and _CLASS.match(named):
        _change(key, named, where, state)
    path = state.classes.get(key)
    if path is None:
        if _ABOUT_CLASS & value.keys():
            return
        if parameter is not None and (fields := nested(parameter)) is not None:
            _keys(value, fields, key, where, state)
            return
        each = None if parameter is None else values_of(parameter)
        for name, one in value.items():  # a mapping of names that the user gives
            if isinstance(one, dict | list):
                _class(one, f"{key}.{name}", each, where, state)
            elif each is not None and (fields := nested(each)) is not None and not _CLASS.match(str(one)):
                raise UserError(
                    f"{where}: `{key}.{name}` is {'empty' if one is None else repr(one)}; it needs keys below it, of "
                    f"{', '.join(fields.parameters)}"
                )
        return
    found = signature_of(path)
    arguments = value.get("init_args") if _ABOUT_CLASS & value.keys() else value
    if found is not None and isinstance(arguments, dict):
        _keys(arguments, found, key, where, state)


def _change(key: str, path: str, where: str, state: _State, certain: bool = True) -> None:
    """Note which class stands at a key from now on. If it is not `certain` that the value is a class, only if it
    exists.

    Raises:
        UserError: there is no such class.
    """
    try:
        signature_of(path)
    except Absent as absent:
        if not certain:
            state.classes.pop(key, None)
            return
        raise UserError(f"{where}: `{_dotted(key, state)}`: {_absent(path, absent)}") from absent
    if state.classes.get(key) != path and key not in CLASSES:
        for below in [one for one in state.classes if one.startswith(f"{key}.")]:
            del state.classes[below]
    state.classes[key] = path


def _absent(path: str, absent: Absent) -> str:
    """What to do about a class that is not there."""
    if path.startswith(f"{PACKAGE}.") and (moved := explain(path)) is not None:
        return moved
    if "." in absent.what:
        return f"there is no class {absent.what}{did_you_mean(path.rpartition('.')[2], absent.names)}"
    return no_package(path)


#: A key in a message: `a.b.c` between backticks, an option, or a dotted key of a fit.
_KEY = re.compile(
    r"`([A-Za-z_][\w.+-]*)`|--([A-Za-z_][\w.]*)|\b((?:model|data|trainer|run)\.[\w.]+)|^([A-Za-z_]\w*) (?=must|is|has)"
)
_OPTION = re.compile(r"Option '([^']+)'|accept option '([^']+)'")


def name_file(message: str, arguments: Sequence[str]) -> str:
    """The message with the name of the config file that gave its key in front; unchanged if no file gave it.

    Args:
        message: one line.
        arguments: the whole command line. If an option after the file gives the same key, the file is not named.
    """
    given = list(_given(arguments))
    files = [file for file, _ in given if file is not None]
    if not files or any(file in message for file in files):
        return message
    for key in _named_keys(message):
        for file, keys in reversed(given):
            if any(_same(key, one) for one in keys):
                return message if file is None else f"{file}: {message}"
    return message


def _named_keys(message: str) -> Iterator[str]:
    """Keys that a message names, the most exact first."""
    found = [next(filter(None, groups)) for groups in _KEY.findall(message)]
    for option in _OPTION.findall(message):
        name = next(filter(None, option))
        yield from (f"{key}.{name}" for key in found)
        yield name
    yield from found


def _same(asked: str, said: str) -> bool:
    """Whether a key of a file is the key that is looked for, or lies below it, or is its last part.

    Parts in the middle may be missing: jsonargparse leaves out names that the user chose, such as an arm's.
    """
    wanted, parts = _plain(asked).split("."), _plain(said).split(".")
    if len(wanted) == 1:
        return wanted[0] in (parts[0], parts[-1])
    left = iter(parts)
    return wanted[0] == parts[0] and all(part in left for part in wanted)


def _plain(key: str) -> str:
    return re.sub(r"\.init_args\b|\.class_path\b|\+", "", key)


def _given(arguments: Sequence[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Each `--config` with its keys, and each option (its file is None) with its key, in their order."""
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if not option.startswith("--") and option != "-c":
            continue
        if option not in ("--config", "-c"):
            yield None, [option.removeprefix("--")]
            continue
        file = value if equals else arguments[i + 1] if i + 1 < len(arguments) else ""
        yield file, list(_leaves(_load(file)))


def _load(file: str) -> Any:
    try:
        path = Path(shipped(file))
        return load_yaml(read_text(path), file) if path.is_file() else None
    except (OSError, UserError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _leaves(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    elif key:
        yield key
