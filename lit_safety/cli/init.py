"""The command `init`: one YAML file of a method to edit, with everything that a run needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_safety.core.errors import UserError

Method = Literal["scdpo", "dpo_expert", "psa", "cost_model"]


def init(folder: str, method: Method = "scdpo", model: str | None = None, overwrite: bool = False) -> None:
    """Write FOLDER/fit.yaml: the shipped config of a method, with a model's settings in it, to be edited.

    Nothing else is read by `fit --config FOLDER/fit.yaml`, so a later version's configs do not change the run.

    Args:
        folder: Where to; made if it is not there.
        method: scdpo, dpo_expert, psa or cost_model.
        model: The settings of a model family, such as sd15, sd21, sdxl or sd3; null keeps the toy world's.
        overwrite: Replace a fit.yaml that is there.

    Raises:
        UserError: there is no such model, or the file is there already.
    """
    from lit_safety.core.files import write_atomic
    from lit_safety.core.shipped import configs

    models = sorted(path.stem for path in configs().glob("models/*.yaml"))
    if model is not None and model not in models:
        raise UserError(f"--model {model}: there are {', '.join(models)}; or leave it out and edit the file")
    if model is not None and method == "cost_model":
        raise UserError("--model: a cost model is trained on images, and not on a text-to-image model: leave it out")
    path = Path(folder) / "fit.yaml"
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already: edit it, name another folder, or give --overwrite true")
    base = (configs() / f"{method}.yaml").read_text(encoding="utf-8")
    overlay = "" if model is None else (configs() / "models" / f"{model}.yaml").read_text(encoding="utf-8")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    write_atomic(path, f"# lit-safety fit --config {path}\n{_notes(overlay)}\n{overlaid(base, overlay)}".encode())
    print(f"config  {path}")
    print("edit    data.init_args.train, data.init_args.val, and all else that names data/toyworld or my-shards")
    print(f"then    lit-safety fit --config {path}")


def _notes(overlay: str) -> str:
    """What a model's YAML says at its head, but how it is used as an overlay."""
    head = overlay.split("\n\n")[0].splitlines()
    return "".join(f"{line}\n" for line in head if not re.search(r"An overlay|python -m|Works with", line))


@dataclass
class _Key:
    """A key of a shipped YAML: block mappings of two spaces, comments above their key."""

    above: list[str]
    """Comments and empty lines."""
    line: str
    below: list[str] = field(default_factory=list)
    """A value of several lines that is not a mapping."""
    keys: dict[str, _Key] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [*self.above, self.line, *self.below, *(line for one in self.keys.values() for line in one.lines())]


_KEY = re.compile(r"( *)([A-Za-z_][\w]*):(?: |$)")


def overlaid(base: str, overlay: str) -> str:
    """A YAML with the keys of another one, and their comments, in the place of its own; both as they are shipped."""
    keys = _parse(base)
    _merge(keys, _parse(overlay))
    return "\n".join(line for one in keys.values() for line in one.lines()).strip("\n") + "\n"


def _merge(keys: dict[str, _Key], others: dict[str, _Key]) -> None:
    for name, other in others.items():
        if name in keys and keys[name].keys and other.keys:
            _merge(keys[name].keys, other.keys)
        else:
            if name in keys:
                gap = [line for line in keys[name].above if not line]
                other.above = gap + [line for line in other.above if line]
            keys[name] = other


def _parse(text: str) -> dict[str, _Key]:
    root: dict[str, _Key] = {}
    way: list[tuple[int, dict[str, _Key]]] = [(-2, root)]
    head, _, rest = text.partition("\n\n")
    above: list[str] = []
    last: _Key | None = None
    # What stands at the head of a shipped file says how it is used where it is.
    for line in (rest if all(line.startswith("#") for line in head.splitlines()) else text).splitlines():
        found = _KEY.match(line)
        if not line.strip() or line.lstrip().startswith("#"):
            above.append(line)
        elif found is None or (last is not None and last.below and len(found[1]) > way[-1][0] + 2):
            assert last is not None
            last.below += [*above, line]
            above = []
        else:
            indent = len(found[1])
            while way[-1][0] >= indent:
                way.pop()
            last = way[-1][1][found[2]] = _Key(above, line)
            way.append((indent, last.keys))
            above = []
    return root
