"""The configs that come with the trainer, found from any folder, and one line where the worlds are missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError

#: The embedded worlds of a checkout. They are too large for an installed package.
WORLDS = ("data/toyworld", "data/artworld", "data/flowtwin")
_PACKAGE = Path(__file__).parents[1]


def configs() -> Path:
    """The folder of the shipped configs: in the installed package, or at the top of a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def shipped(path: str) -> str:
    """``path`` itself where there is such a file or folder; else the shipped config of that name.

    `scdpo.yaml`, `configs/scdpo.yaml`, `models/sd15.yaml` and `sd15.yaml` all name what is shipped: a folder of the
    user's own that is called `configs` goes first.

    Args:
        path: as it was given. If no shipped config has this name, it is returned unchanged.
    """
    if Path(path).exists() or not path.endswith((".yaml", ".yml", ".txt")) or Path(path).is_absolute():
        return path
    root = configs()
    inner = path.removeprefix("./").removeprefix("configs/")
    if ".." in Path(inner).parts:
        return path
    if (root / inner).is_file():
        return str(root / inner)
    found = [] if "/" in inner else sorted(root.glob(f"*/{inner}"))
    return str(found[0]) if len(found) == 1 else path


def find_configs(arguments: Sequence[str]) -> list[str]:
    """The command line with each `--config` as a path: a file that exists, or a shipped config."""
    found: list[str] = []
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if equals and option in ("--config", "-c"):
            found.append(f"{option}={shipped(value)}")
        else:
            found.append(shipped(word) if i and arguments[i - 1] in ("--config", "-c") else word)
    return found


def check_is_there(config: str) -> None:
    """Refuse a `--config` that does not exist, and name shipped configs with a similar name.

    Raises:
        UserError: names it.
    """
    from lit_safety.core.meant import did_you_mean

    file = Path(shipped(config))
    if file.is_file():
        return
    here = [str(one) for one in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    known = [*here, *(str(one.relative_to(configs())) for one in sorted(configs().glob("**/*.yaml")))]
    what = "is a folder" if file.is_dir() else "there is no such file"
    raise UserError(f"--config {config}: {what}{did_you_mean(config, known, listed=False)}")


def check_worlds(settings: Mapping[str, Any], keys: Sequence[str] | None = None) -> None:
    """Refuse settings that name files of an embedded world if the world is not there.

    Args:
        settings: a command's, nested.
        keys: the beginnings of the dotted keys that are read; None: all but `out`.

    Raises:
        UserError: names the first such key, and where the world comes from.
    """
    for key, value in _texts(settings):
        read = not key.endswith("out") if keys is None else key.startswith(tuple(keys))
        if not read:
            continue
        world = next((one for one in WORLDS if re.match(rf"(\./)?{one}(/|$)", value)), None)
        if world is not None and not Path(world).is_dir():
            raise UserError(
                f"`{key}` {value}: the embedded worlds come with a clone of lit_safety's repository{_address()}, and "
                "not with the installed package: run in the clone's folder, or name files of your own"
            )


def _address() -> str:
    """The repository's address, if the installed package states it."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        urls = metadata("lit-safety").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    named = dict(url.split(", ", 1) for url in urls if ", " in url)
    return f" ({named['Repository']})" if "Repository" in named else ""


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str | Path):
        yield key, str(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
