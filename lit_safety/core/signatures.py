"""Which arguments classes and functions take, read from their source: keys are checked before torch is imported.

Only what the source says directly is known. If a name is made while a module runs, or arguments are passed on to
something that cannot be found, the answer is "not known".
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Parameter:
    """One key of a class."""

    name: str
    module: str
    """The module that defines it, where the names in its type are looked up."""
    annotation: ast.expr | None
    default: str | None
    """As it stands in the source; None: it must be given."""
    doc: str

    @property
    def type(self) -> str:
        """Its type as it stands in the source."""
        return "" if self.annotation is None else ast.unparse(self.annotation).strip("'\"")


@dataclass
class Signature:
    """The arguments of a class or function."""

    name: str
    doc: str
    """The first paragraph of its docstring."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False
    """Whether it may take more than `parameters` holds."""


class Absent(Exception):
    """There is no such module or class; `names` are those that exist."""

    def __init__(self, what: str, names: list[str]) -> None:
        super().__init__(what)
        self.what = what
        self.names = names


def signature_of(path: str) -> Signature | None:
    """The arguments of `package.Class`; None: its source does not say.

    Raises:
        Absent: there is certainly no such module, or no such name in it.
    """
    module, _, name = path.rpartition(".")
    if not module:
        return None
    found = _find(module, name)
    return None if found is None else _signature(*found)


def nested(parameter: Parameter) -> Signature | None:
    """The arguments of the only dataclass in a parameter's type; None: there is none, or there are several."""
    annotation = _annotation(parameter)
    if annotation is None:
        return None
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} - _PLAIN
    if len(names) != 1 or any(isinstance(node, ast.Attribute | ast.Subscript) for node in ast.walk(annotation)):
        return None
    try:
        found = _find(parameter.module, names.pop())
    except Absent:
        return None
    if found is None or not isinstance(found[1], ast.ClassDef) or not _is_dataclass(found[1]):
        return None
    return _signature(*found)


def values_of(parameter: Parameter) -> Parameter | None:
    """For a parameter of type `dict[str, X]`, a parameter of type X; None: it has another type."""
    annotation = _annotation(parameter)
    for one in ast.walk(annotation) if annotation is not None else ():
        if isinstance(one, ast.Subscript) and ast.unparse(one.value) == "dict" and isinstance(one.slice, ast.Tuple):
            return Parameter(parameter.name, parameter.module, one.slice.elts[1], None, "")
    return None


def _annotation(parameter: Parameter) -> ast.expr | None:
    annotation = parameter.annotation
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return None
    return annotation


_PLAIN = {"None", "Optional", "Union"}
#: Decorators that do not change a class's arguments.
_KNOWN_DECORATORS = re.compile(r"(dataclass|runtime_checkable|final|deprecated)$")


# ---- find the source


def _file(module: str) -> Path | None:
    """The file of a module; None: it is not a Python file.

    Raises:
        Absent: there is no such module.
    """
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        raise Absent(top, [])
    if not spec.submodule_search_locations:
        return Path(spec.origin) if not below and spec.origin and spec.origin.endswith(".py") else None
    folders = [Path(one) for one in spec.submodule_search_locations]
    for number, part in enumerate(below):
        deeper = [one / part for one in folders if (one / part).is_dir()]
        file = next((one / f"{part}.py" for one in folders if (one / f"{part}.py").is_file()), None)
        if file is not None and number == len(below) - 1 and not any((one / "__init__.py").is_file() for one in deeper):
            return file
        if not deeper:
            return None
        folders = deeper
    return next((one / "__init__.py" for one in folders if (one / "__init__.py").is_file()), None)


@cache
def _parse(file: Path, changed: int) -> ast.Module:
    return ast.parse(file.read_bytes())


def _trees(module: str) -> tuple[ast.Module, ...]:
    """The parsed source of a module. For a package that exports lazily, its list of names comes first."""
    file = _file(module)
    trees = []
    for one in [] if file is None else [file.with_suffix(".pyi"), file]:
        if one.is_file():
            try:
                trees.append(_parse(one, one.stat().st_mtime_ns))
            except (OSError, SyntaxError, ValueError):
                return ()
    return tuple(trees)


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """A module's own statements, also those within `if` and `try`."""
    left: list[ast.stmt] = list(tree.body)
    while left:
        one = left.pop(0)
        yield one
        for part in ("body", "orelse", "finalbody") if isinstance(one, ast.If | ast.Try) else ():
            left += getattr(one, part, [])


def _find(module: str, name: str, depth: int = 0) -> tuple[str, Definition] | None:
    """Where a name is defined, and how; None: that is not known.

    Raises:
        Absent: it is certainly not defined.
    """
    trees = _trees(module)
    if depth > 8 or not trees:
        return None
    names: list[str] = []
    certain = True
    for tree in trees:
        for one in _statements(tree):
            if isinstance(one, ast.ClassDef | ast.FunctionDef):
                if one.name == name:
                    return module, one
                names.append(one.name)
                certain = certain and one.name != "__getattr__"
            elif isinstance(one, ast.ImportFrom):
                for alias in one.names:
                    if (alias.asname or alias.name) == name:
                        return _find(_absolute(module, one), alias.name, depth + 1)
                    certain = certain and alias.name != "*"
                    names.append(alias.asname or alias.name)
            elif isinstance(one, ast.For | ast.While | ast.With) or (
                isinstance(one, ast.Expr) and isinstance(one.value, ast.Call)
            ):
                certain = False  # names may be made there
            elif isinstance(one, ast.Import):
                names += [alias.asname or alias.name for alias in one.names]
            elif isinstance(one, ast.Assign | ast.AnnAssign):
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                given = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
                if name in given:
                    return None
                # `__getattr__, __dir__, __all__ = lazy_loader.attach_stub(...)`: the stub lists all
                certain = certain and ("__getattr__" not in given or len(trees) > 1)
                names += given
    if name in names or not certain:
        return None
    try:
        if _file(f"{module}.{name}") is not None:  # a module of the package
            return None
    except Absent:
        return None
    raise Absent(f"{module}.{name}", [one for one in names if not one.startswith("_") and one != "lazy_loader"])


def _absolute(module: str, one: ast.ImportFrom) -> str:
    if not one.level:
        return one.module or ""
    file = _file(module)
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(one.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{one.module}" if one.module else package


# ---- read the source


def _signature(module: str, found: Definition, depth: int = 0) -> Signature:
    doc = ast.get_docstring(found, clean=True) or ""
    said = Signature(found.name, inspect.cleandoc(doc).split("\n\n")[0].replace("\n", " "))
    if depth > 8:
        said.open = True
        return said
    if isinstance(found, ast.FunctionDef):
        _add(said, module, found, doc, depth, None)
        return said
    made = [target for one in found.body if isinstance(one, ast.Assign) for target in one.targets]
    said.open = any(isinstance(one, ast.Name) and one.id == "__init__" for one in made) or any(
        not _KNOWN_DECORATORS.search(ast.unparse(one).split("(")[0]) for one in found.decorator_list
    )
    constructor = next((one for one in found.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if constructor is not None:
        _add(said, module, constructor, f"{doc}\n{ast.get_docstring(constructor) or ''}", depth, found)
    elif _is_dataclass(found):
        _take(said, _bases(module, found, depth))
        docs = _documented(doc)
        for one in found.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                name = one.target.id
                default = None if one.value is None else _default(one.value)
                said.parameters[name] = Parameter(name, module, one.annotation, default, docs.get(name, ""))
    else:
        _take(said, _bases(module, found, depth))
    return said


def _take(said: Signature, others: list[Signature | None]) -> None:
    """Add the parameters of others that the class does not have itself."""
    for other in others:
        said.open = said.open or other is None or other.open
        for name, one in (other.parameters if other is not None else {}).items():
            said.parameters.setdefault(name, one)


def _bases(module: str, found: ast.ClassDef, depth: int) -> list[Signature | None]:
    signatures: list[Signature | None] = []
    for base in found.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(name, ast.Name) and name.id in ("ABC", "Protocol", "object", "Generic"):
            continue
        try:
            place = _find(module, name.id) if isinstance(name, ast.Name) else None
        except Absent:
            place = None
        signatures.append(None if place is None else _signature(*place, depth + 1))
    return signatures


def _add(
    said: Signature, module: str, function: ast.FunctionDef, doc: str, depth: int, owner: ast.ClassDef | None
) -> None:
    """The parameters of a function, and those of the functions that it passes its `**` arguments on to."""
    docs = _documented(doc)
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(given.defaults)), *given.defaults]
    for one, default in [*zip(plain, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
        if owner is not None and one is plain[0]:
            continue
        text = None if default is None else _default(default)
        said.parameters[one.arg] = Parameter(one.arg, module, one.annotation, text, docs.get(one.arg, ""))
    if given.kwarg is None:
        return
    handed: list[Signature | None] = []
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        if not any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == given.kwarg.arg
                   for k in call.keywords):  # fmt: skip
            continue
        to = call.func
        if owner is not None and isinstance(to, ast.Attribute) and ast.unparse(to) == "super().__init__":
            handed += _bases(module, owner, depth)
        elif isinstance(to, ast.Name):
            try:
                place = _find(module, to.id)
            except Absent:
                place = None
            handed.append(None if place is None else _signature(*place, depth + 1))
        else:
            handed.append(None)
    _take(said, handed or [None])


def _is_dataclass(found: ast.ClassDef) -> bool:
    return any(ast.unparse(one).split("(")[0].endswith("dataclass") for one in found.decorator_list)


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    return "null" if text == "None" else {"True": "true", "False": "false"}.get(text, text)


_ARGUMENT = re.compile(r"^    (\w+)(?: \([^)]*\))?: ?(.*(?:\n {5,}.*)*)", re.MULTILINE)


def _documented(doc: str) -> dict[str, str]:
    """What a docstring says about each argument, under `Args:`."""
    doc = textwrap.dedent(doc)
    section = re.search(r"^Args:\n((?: {4,}.*\n|\n)*)", f"{doc}\n", re.MULTILINE)
    found = _ARGUMENT.findall(section[1]) if section else []
    return {name: " ".join(text.split()) for name, text in found}
