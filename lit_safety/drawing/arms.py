"""An arm: one contender in an evaluation. All arms draw the same prompts from the same seeds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256, digest
from lit_safety.core.text import load_yaml
from lit_safety.drawing.guards.guard import Guard

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Arm:
    """What is put on top of the pipeline; nothing at all is the base."""

    adapter: str | None = None
    """Folder or file of a LoRA, or of a user adapter (PSA)."""
    scale: float = 1.0
    """Strength of the adapter: 1 as trained, 0 the base, below 0 the opposite of what it learned."""
    pipeline: str | None = None
    """Another pipeline to draw with, such as a fused model; default: the evaluated one."""
    unet: str | None = None
    """A UNet that was published alone, in place of the pipeline's: a `unet/` folder, or one safetensors file."""
    unet_partial: bool = False
    """The file holds the weights that were changed only, as those of ESD and UCE do; the others are the pipeline's."""
    images: str | None = None
    """A folder of images that another program drew for the same prompts; nothing is drawn then."""
    same_seeds: bool | None = None
    """Whether these images were drawn from the seeds of the prompt file, so that figures are paired; default: if the
    file has seeds."""
    negative_prompt: str | None = None
    """What guidance moves away from, in every drawing."""
    adapters: dict[str, float] | None = None
    """Several at once, folder or file -> weight; updates of LoRAs are added up, to that of `adapter` too, and one of
    them may be a user adapter."""
    guard: Guard | None = None
    """What guards the drawing on top: SafeLatentDiffusion or SAFREE, by class_path and init_args."""
    user: str | None = None
    """Whom a user adapter draws for; default: the null user, in `users evaluate` each prompt's own user."""
    users: str | None = None
    """users.safetensors with that user's embedding, or its folder; default: the one next to the user adapter."""

    def loras(self) -> dict[str, float]:
        """All LoRAs of the arm with their weights."""
        return {path: weight for path, weight in self._adapters().items() if not _is_for_users(path)}

    def user_adapter(self) -> tuple[str, float] | None:
        """The arm's user adapter and its scale; None: it has none."""
        return next(((path, weight) for path, weight in self._adapters().items() if _is_for_users(path)), None)

    def _adapters(self) -> dict[str, float]:
        return {**({self.adapter: self.scale} if self.adapter is not None else {}), **(self.adapters or {})}

    def check(self, name: str) -> None:
        """Complain about what can be seen without loading anything.

        Raises:
            UserError: the name cannot be a folder's, or the adapter is not there.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*", name):
            raise UserError(f"--arms.{name}: an arm's name is made of letters, digits, blanks and . _ + -")
        self._check_images(name)
        if self.unet is not None:
            from lit_safety.drawing.unets import find_unet

            try:
                find_unet(self.unet)
            except UserError as error:
                raise UserError(f"arm {name}: unet: {error}") from error
        elif self.unet_partial:
            raise UserError(f"arm {name}: unet_partial is about its `unet`, and it names none")
        if self.adapter is not None and not Path(self.adapter).exists():
            raise UserError(f"arm {name}: the adapter {self.adapter} does not exist; train one with `fit`")
        if self.adapter is not None and self.adapter in (self.adapters or {}):
            raise UserError(f"arm {name}: {self.adapter} is both its adapter and one of its adapters")
        for adapter, weight in (self.adapters or {}).items():
            if not Path(adapter).exists():
                raise UserError(f"arm {name}: the adapter {adapter} does not exist; train one with `fit`")
            if not isfinite(weight):
                raise UserError(f"arm {name}: the weight {weight} of {adapter} is not a finite number")
        several = [path for path in self._adapters() if _is_for_users(path)]
        if len(several) > 1:
            raise UserError(f"arm {name}: {' and '.join(several)} are both user adapters; an arm takes one")
        if not several and (self.user or self.users):
            raise UserError(f"arm {name}: draws for a user and has no user adapter; name one in its adapter")
        if self.user is not None:
            self._embedding()
        if self.guard is not None and not isinstance(getattr(self.guard, "settings", None), dict):
            kind = type(self.guard).__name__
            raise UserError(
                f"arm {name}: the guard {kind} has no `settings`: set `self.settings` to a dict of all that changes "
                "pixels when it is made (the report shows it, and images of other settings are drawn anew)"
            )

    def _check_images(self, name: str) -> None:
        if self.images is None:
            if self.same_seeds is not None:
                raise UserError(f"arm {name}: same_seeds is about its `images`, and it names none")
            return
        others = [one.name for one in fields(self) if one.name not in ("images", "same_seeds")]
        if given := [key for key in others if getattr(self, key) != getattr(Arm(), key)]:
            raise UserError(
                f"arm {name}: its images were drawn already, so {', '.join(given)} would change nothing; leave one of "
                "them out"
            )

    def otherwise(self, negative_prompt: str | None) -> Arm:
        """The same arm with this negative prompt, where it draws and names none of its own."""
        return (
            self if self.negative_prompt is not None or self.images else replace(self, negative_prompt=negative_prompt)
        )

    def describe(self, pipeline: Path | None = None) -> dict[str, Any]:
        """The arm as it stands in a report: what it is, and the sha256 of the weights it adds.

        Args:
            pipeline: the folder of the pipeline that it draws with, to say how much of its UNet is replaced.
        """
        return {
            "adapter": self.adapter,
            "adapter_sha256": adapter_sha256(self.adapter) if self.adapter is not None else None,
            "scale": self.scale if self.adapter is not None else None,
            "negative_prompt": self.negative_prompt,
            **(self._unet(self.unet, pipeline) if self.unet is not None else {}),
            **({"adapters": self._composed()} if self.adapters else {}),
            **({"guard": self.guard.settings} if self.guard is not None else {}),
            **({"user": self._whom()} if self.user_adapter() is not None else {}),
        }

    @staticmethod
    def _unet(unet: str, pipeline: Path | None) -> dict[str, Any]:
        from lit_safety.drawing.unets import describe_unet

        return describe_unet(unet, pipeline)

    def _whom(self) -> dict[str, Any]:
        return {"id": self.user, "sha256": None if self.user is None else digest(self._embedding())}

    def _embedding(self) -> list[float]:
        from lit_safety.adapters.user_file import find_user_adapter
        from lit_safety.users.table import Users

        adapter = self.user_adapter()
        assert adapter is not None
        assert self.user is not None
        return Users(self.users or find_user_adapter(adapter[0]).parent).embeddings([self.user])[0].tolist()

    def _composed(self) -> dict[str, Any]:
        weights = self.adapters or {}
        return {path: {"weight": weight, "sha256": adapter_sha256(path)} for path, weight in weights.items()}


def adapter_sha256(path: str | Path) -> str:
    """Of an adapter's folder or file. Where PEFT's weights are named alone, the configuration next to them, which says
    their alpha, counts too."""
    from lit_safety.adapters.peft_config import find_peft

    own = find_peft(Path(path)) if Path(path).is_file() else None
    return content_sha256(path) if own is None else digest([content_sha256(file) for file in own])


def _is_for_users(path: str) -> bool:
    from lit_safety.adapters.user_file import is_user_adapter

    return is_user_adapter(path)


def collect_arms(
    adapter: str | None, arms: dict[str, Arm] | None, negative_prompt: str | None = None
) -> dict[str, Arm]:
    """`base`, then `aligned` when an adapter is given, then the named ones, checked.

    Where the adapter is one for users, `aligned` draws for the null user.

    Args:
        adapter: of `aligned`.
        arms: by name.
        negative_prompt: of every arm that names none of its own.

    Raises:
        UserError: a name is taken or bad, or an adapter is missing.
    """
    collected = {"base": Arm()}
    if adapter is not None:
        collected["aligned"] = Arm(adapter=adapter)
    for name, arm in (arms or {}).items():
        if name in collected:
            raise UserError(f"--arms.{name}: this name is taken: `base` is the pipeline, `aligned` is --adapter")
        collected[name] = arm
    for name, arm in collected.items():
        arm.check(name)
    return {name: arm.otherwise(negative_prompt) for name, arm in collected.items()}


def gather_arms(arguments: Sequence[str]) -> list[str]:
    """A command line in which each arm is one argument: jsonargparse reads no keys below a dict's own.

    `--arms.half.adapter x --arms.half.scale 0.5` -> `--arms.half={"adapter": "x", "scale": 0.5}`, at the end.

    Raises:
        UserError: an arm has no such key, or a value is missing or is not a number where one is needed.
    """
    known = [field.name for field in fields(Arm)]
    rest: list[str] = []
    arms: dict[str, dict[str, Any]] = {}
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        name, dot, key = option.removeprefix("--arms.").rpartition(".")
        if not option.startswith("--arms.") or not dot:
            rest.append(word)
            continue
        if key not in known:
            raise UserError(f"{option}: an arm has no key `{key}`; it has {', '.join(known)}")
        if not equals:
            value = next(words, "")
        arms.setdefault(name, {})[key] = _read(option, key, value)
    return [*rest, *(f"--arms.{name}={json.dumps(keys)}" for name, keys in arms.items())]


def _read(option: str, key: str, value: str) -> Any:
    if not value:
        raise UserError(f"{option}: needs a value")
    if key in ("adapters", "guard"):
        return _structure(option, value)
    if key in ("unet_partial", "same_seeds"):
        if value not in ("true", "false"):
            raise UserError(f"{option} {value}: must be true or false")
        return value == "true"
    if key != "scale":
        return None if value == "null" else value
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"{option} {value}: must be a number") from error


def _structure(option: str, value: str) -> Any:
    import yaml

    try:
        return load_yaml(value, option)
    except yaml.YAMLError as error:
        raise UserError(f"{option} {value}: is neither JSON nor YAML") from error
