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
    """What is added to the pipeline; without any addition it is the base."""

    adapter: str | None = None
    """Folder or file of a LoRA, or of a user adapter (PSA)."""
    scale: float = 1.0
    """Strength of the adapter: 1 as trained, 0 the base, below 0 the opposite of what it learned."""
    pipeline: str | None = None
    """Another pipeline to draw with, such as a fused model; default: the evaluated one."""
    unet: str | None = None
    """A UNet that was published alone, in place of the pipeline's: a `unet/` folder, or one safetensors file."""
    unet_partial: bool = False
    """The file holds only the weights that were changed, as those of ESD and UCE do; the others are the pipeline's."""
    images: str | None = None
    """A folder of images that another program drew for the same prompts; the arm then draws no images."""
    same_seeds: bool | None = None
    """Whether these images were drawn from the seeds of the prompt file, so that figures are paired; default: if the
    file has seeds."""
    negative_prompt: str | None = None
    """The text that guidance moves away from, for every image."""
    adapters: dict[str, float] | None = None
    """Several adapters, folder or file -> weight. The updates of LoRAs, also that of `adapter`, are added up, and one
    of them may be a user adapter."""
    guard: Guard | None = None
    """A guard in addition: SafeLatentDiffusion or SAFREE, by class_path and init_args."""
    user: str | None = None
    """The user that a user adapter draws for; default: the null user, in `users evaluate` each prompt's own user."""
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
        """Refuse errors that can be seen without loading anything.

        Raises:
            UserError: the name cannot be a folder's name, or the adapter does not exist.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*", name):
            raise UserError(f"--arms.{name}: an arm's name may hold letters, digits, blanks and . _ + -")
        self._check_images(name)
        if self.unet is not None:
            from lit_safety.drawing.unets import find_unet

            try:
                find_unet(self.unet)
            except UserError as error:
                raise UserError(f"arm {name}: unet: {error}") from error
        elif self.unet_partial:
            raise UserError(f"arm {name}: unet_partial needs a `unet`, which is missing")
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
            raise UserError(f"arm {name}: {' and '.join(several)} are both user adapters; an arm can have one")
        if not several and (self.user or self.users):
            raise UserError(f"arm {name}: draws for a user, but lacks a user adapter; name one as its adapter")
        if self.user is not None:
            self._embedding()
        if self.guard is not None and not isinstance(getattr(self.guard, "settings", None), dict):
            kind = type(self.guard).__name__
            raise UserError(
                f"arm {name}: the guard {kind} has no `settings`: in `__init__` set `self.settings` to a dict of all "
                "that changes pixels (the report shows it, and images of other settings are drawn again)"
            )

    def _check_images(self, name: str) -> None:
        if self.images is None:
            if self.same_seeds is not None:
                raise UserError(f"arm {name}: same_seeds needs `images`, which are missing")
            return
        others = [one.name for one in fields(self) if one.name not in ("images", "same_seeds")]
        if given := [key for key in others if getattr(self, key) != getattr(Arm(), key)]:
            raise UserError(
                f"arm {name}: its images exist already, so {', '.join(given)} would have no effect; remove one of "
                "them out"
            )

    def otherwise(self, negative_prompt: str | None) -> Arm:
        """The same arm with this negative prompt, if it draws and does not have its own."""
        return (
            self if self.negative_prompt is not None or self.images else replace(self, negative_prompt=negative_prompt)
        )

    def describe(self, pipeline: Path | None = None) -> dict[str, Any]:
        """The arm for a report: its settings, and the sha256 of the weights that it adds.

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
    """Of an adapter's folder or file. For a file of PEFT's weights, the configuration next to it, which holds alpha,
    counts too."""
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

    If the adapter is a user adapter, `aligned` draws for the null user.

    Args:
        adapter: of `aligned`.
        arms: by name.
        negative_prompt: of every arm that does not have its own.

    Raises:
        UserError: a name is used already or not valid, or an adapter is missing.
    """
    collected = {"base": Arm()}
    if adapter is not None:
        collected["aligned"] = Arm(adapter=adapter)
    for name, arm in (arms or {}).items():
        if name in collected:
            raise UserError(f"--arms.{name}: this name is reserved: `base` is the pipeline, `aligned` is --adapter")
        collected[name] = arm
    for name, arm in collected.items():
        arm.check(name)
    return {name: arm.otherwise(negative_prompt) for name, arm in collected.items()}


def gather_arms(arguments: Sequence[str]) -> list[str]:
    """A command line in which each arm is one argument: jsonargparse reads no keys below a dict's own.

    `--arms.half.adapter x --arms.half.scale 0.5` -> `--arms.half={"adapter": "x", "scale": 0.5}`, at the end.

    Raises:
        UserError: an arm does not have such a key, or a value is missing or must be a number.
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
            raise UserError(f"{option}: an arm does not have a key `{key}`; known are {', '.join(known)}")
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
