"""Protocols by name: how a published figure was measured, so that your figure can be measured in the same way.

A protocol is a file of `configs/protocols/`. It holds what the prompt file must contain, the steps, guidance and seeds,
the judge with its classes and threshold, the figures that count, and the sources of all this. What the sources do not
state is written as `not stated`; then the command's own value is used, and the report says so. A report names the
protocol, its hash and all deviations from it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, StrictBool, StrictInt, TypeAdapter

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.core.meant import did_you_mean
from lit_safety.core.records import Number, Text, checked
from lit_safety.core.shipped import configs, shipped
from lit_safety.core.text import load_yaml, read_text

if TYPE_CHECKING:
    from lit_safety.drawing.prompts import Prompt, PromptSet


NOT_STATED: Literal["not stated"] = "not stated"
"""The value of a setting that no source of the protocol states."""
NOT_AVAILABLE: Literal["not available"] = "not available"
"""The value of `judge` if the sources state a judge that cannot be used here."""
Unstated = Literal["not stated"]
Command = Literal["evaluate", "users evaluate"]
STRICT = ConfigDict(extra="forbid")


def _positive(value: int) -> int:
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _seed(value: int) -> int:
    if not 0 <= value < 2**63:
        raise ValueError("must be a seed from 0 to 2^63 - 1")
    return value


def _category(name: str) -> str:
    try:
        return canonical_category(name)
    except UserError as error:
        raise ValueError(str(error)) from error


Count = Annotated[StrictInt, AfterValidator(_positive)]
Seed = Annotated[StrictInt, AfterValidator(_seed)]
Category = Annotated[Text, AfterValidator(_category)]


@dataclass(frozen=True)
class PromptNeeds:
    """What the prompt file must contain."""

    __pydantic_config__: ClassVar = STRICT
    columns: tuple[Text, ...]
    """All must exist; of names separated by `|`, one is enough."""
    rows: Count | Unstated
    kinds: tuple[Literal["explicit", "implicit", "adversarial", "lookalike", "clean"], ...]
    """At least one prompt of each kind must exist."""
    categories: tuple[Category, ...] = ()
    """At least one prompt of each category must exist."""
    kind: Literal["explicit", "implicit", "adversarial", "lookalike", "clean"] | None = None
    """The kind of the prompts, if the file's columns do not say it."""
    category: Category | None = None
    """The harm that the prompts ask for, if the file's columns do not say it."""


@dataclass(frozen=True)
class Drawing:
    """How images are drawn."""

    __pydantic_config__: ClassVar = STRICT
    steps: Count | Unstated
    guidance: Number | Unstated
    """For rows without their own guidance scale."""
    resolution: Count | Unstated
    seeds: tuple[Seed, ...] | Literal["column", "row"] | Unstated
    """A list: every prompt is drawn once with each seed. `column`: each row must have a seed. `row`: a row without a
    seed gets one that is computed from its content."""
    own_guidance: StrictBool = True
    """Whether rows with their own guidance scale keep it."""
    images: Count = 1
    """Images of each prompt, if `seeds` is not a list."""


@dataclass(frozen=True)
class Protocol:
    """A protocol, with the keys of its file."""

    __pydantic_config__: ClassVar = STRICT
    title: Text
    command: Command
    source: tuple[Text, ...]
    prompts: PromptNeeds
    drawing: Drawing
    judge: dict[str, Any] | Literal["not stated", "not available"]
    """`class_path` and `init_args`, as in the files of configs/judges."""
    counted: tuple[Text, ...]
    """The figures of the report that belong to the protocol, the main one first."""
    quality: dict[str, Text] = field(default_factory=dict)
    """`fid` and `clip` of `evaluate`; `reference`: the images that FID must be given."""
    differs: tuple[Text, ...] = ()
    """Where this program differs from the source."""
    name: str = ""
    sha256: str = ""
    """Of the file's content, without comments."""

    def describe(self, deviations: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What a report says about the protocol.

        Args:
            deviations: each setting that differs from the protocol, as {protocol, here}.
            chosen: each setting that the protocol does not state -> the value that was used.
        """
        about: dict[str, Any] = {"name": self.name, "sha256": self.sha256, "title": self.title}
        about |= {"source": list(self.source), "counted": list(self.counted), "differs": list(self.differs)}
        return about | {"not_stated": dict(chosen), "deviations": dict(deviations)}

    @property
    def images(self) -> int:
        """The number of images of each prompt."""
        return len(self.drawing.seeds) if isinstance(self.drawing.seeds, tuple) else self.drawing.images


_RECORD = TypeAdapter(Protocol)
FIGURE_OF_USERS = ("pass_rate", "win_rate")
"""The figures of `users evaluate`."""


def names() -> list[str]:
    """The names of the shipped protocols."""
    return sorted(file.stem for file in (configs() / "protocols").glob("*.yaml"))


def load_protocol(name: str, command: Command = "evaluate") -> Protocol:
    """Load a shipped protocol by its name, or a protocol from your own file.

    Args:
        name: one of `names()`, or a YAML file.
        command: the command that follows the protocol.

    Raises:
        UserError: the protocol does not exist, its file is wrong, or it is for another command.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else configs() / "protocols" / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"--protocol {name}: there is no such protocol{did_you_mean(name, names())}")
    try:
        said = load_yaml(read_text(file), str(file))
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--protocol {file}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(said, dict) or {"name", "sha256"} & said.keys():
        raise UserError(f"--protocol {file}: must hold the keys of a protocol, as configs/protocols/* do")
    where = f"--protocol {file}"
    found = checked(_RECORD, {**said, "name": file.stem, "sha256": digest(said)}, where)
    _check(found, where)
    if found.command != command:
        raise UserError(f"--protocol {name}: is for the command `{found.command}`, not for `{command}`")
    return found


def _check(protocol: Protocol, where: str) -> None:
    from lit_safety.evaluation.metrics import FIGURES
    from lit_safety.evaluation.tables import QUALITY

    known = {*FIGURES, *QUALITY} if protocol.command == "evaluate" else {*FIGURE_OF_USERS}
    if unknown := [figure for figure in protocol.counted if figure.partition("/")[0] not in known]:
        raise UserError(
            f"{where}: `counted` names the figure {unknown[0]}; the known figures are {', '.join(sorted(known))}"
        )
    if isinstance(protocol.judge, dict) and protocol.judge.keys() != {"class_path", "init_args"}:
        raise UserError(
            f"{where}: `judge` must be `not stated` or `not available`, or hold exactly `class_path` and `init_args`"
        )
    if other := protocol.quality.keys() - {"fid", "clip", "reference"}:
        raise UserError(f"{where}: `quality` has the unknown key {min(other)!r}; it may hold fid, clip, reference")


def deviate(key: str, protocol: Any, here: Any) -> dict[str, dict[str, Any]]:
    """One deviation, in the form of a report."""
    return {key: {"protocol": protocol, "here": here}}


@dataclass
class Applied:
    """A protocol together with the options of the command.

    Args:
        protocol: the protocol that is followed.
        allowed: whether deviations are allowed; they are then recorded, otherwise refused.
    """

    protocol: Protocol
    allowed: bool
    deviations: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)

    def value(self, key: str, stated: Any, given: Any, default: Any, name: str = "") -> Any:
        """The value of an option: the protocol's value, or the given value if deviations are allowed.

        Args:
            key: the option, without dashes.
            stated: the protocol's value; `not stated` leaves it to the command.
            given: the value that the command got; its default counts as not given.
            default: the option's default.
            name: a short name of a long value, for the report.

        Raises:
            UserError: another value was given, and deviations are not allowed.
        """
        if stated == NOT_STATED:
            self.chosen[key] = name or given
            return given
        if given in (default, stated):
            return stated
        open_to = "leaves it to the prompt file" if key.startswith("prompt_") else "draws every prompt"
        says = open_to if stated is None else f"says {stated}"
        self.refuse(f"--{key} {name or given}: the protocol {self.protocol.name} {says}; leave it out")
        self.deviations |= deviate(key, stated, name or given)
        return given

    def judge(self, given: Any) -> Any:
        """The judge that decides: the protocol's judge, or the given one.

        The paths of its CLIP and prompts and its device are not part of the protocol; the report holds their hashes.

        Raises:
            UserError: another judge was given, and deviations are not allowed.
        """
        stated, name = self.protocol.judge, given if isinstance(given, str) else str(_plain(given).get("class_path"))
        if isinstance(stated, str):
            if given is None:
                why = "does not state a judge" if stated == NOT_STATED else "states a judge that is not available here"
                raise UserError(f"--judge: the protocol {self.protocol.name} {why}; name the judge that decides")
            self.chosen["judge"] = name
            return given
        if given is None or _essence(_described(given)) == _essence(stated):
            return stated if given is None else given
        self.refuse(f"--judge {name}: the protocol {self.protocol.name} has its own; leave --judge out")
        self.deviations |= deviate("judge", stated, name)
        return given

    def drawing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `DrawingSettings` as the protocol states them."""
        from lit_safety.drawing.gallery import DrawingSettings

        found, stated = dict(given), self.protocol.drawing
        for key in ("steps", "guidance", "resolution"):
            default = DrawingSettings.__dataclass_fields__[key].default
            found[key] = self.value(key, getattr(stated, key), given.get(key, default), default)
        return found

    def seeds(self, images: int) -> Sequence[int] | None:
        """The seeds of every prompt; None: each prompt has its own.

        Args:
            images: the number of images of each prompt.
        """
        stated = self.protocol.drawing.seeds
        if stated == NOT_STATED:
            self.chosen["seeds"] = "of each row: its own seed, or one computed from its content"
        return stated[:images] if isinstance(stated, tuple) and images <= len(stated) else None

    def lacks(self, message: str) -> None:
        """Refuse or record that an option which the protocol needs was not given.

        Raises:
            UserError: deviations are not allowed.
        """
        self.refuse(f"{message}; give it")
        self.deviations |= deviate(message.partition(":")[0].lstrip("-"), "needed", "not given")

    def refuse(self, message: str) -> None:
        """Refuse a deviation that is not allowed.

        Raises:
            UserError: it is not allowed.
        """
        if not self.allowed:
            raise UserError(f"{message}, or allow deviations, which the report then names, with --deviate true")

    def check_prompts(self, prompts: PromptSet, file: str) -> None:
        """Refuse a prompt file that lacks something that the protocol needs.

        Raises:
            UserError: the message names the file and everything that is missing.
        """
        needs = self.protocol.prompts
        lacking: list[str] = []
        there = {name.casefold() for name in prompts.columns}
        absent = [one for one in needs.columns if not there & {name.casefold() for name in one.split("|")}]
        if absent:
            lacking.append(f"the columns {', '.join(one.replace('|', ' or ') for one in absent)}")
        rows = len({p.place.row for p in prompts if p.place is not None}) + len(prompts.without_prompt)
        if needs.rows == NOT_STATED:
            self.chosen["prompts"] = rows
        elif rows != needs.rows:
            lacking.append(f"{needs.rows:,} rows (it has {rows:,})")
        kinds = [kind for kind in needs.kinds if not any(p.kind == kind for p in prompts)]
        if kinds:
            lacking.append(f"prompts of the kind {', '.join(kinds)}")
        seen = {category for p in prompts if p.harmful for category in (p.category, *p.also)}
        if without := [category for category in needs.categories if category not in seen]:
            lacking.append(f"prompts for {', '.join(without)}")
        if self.protocol.drawing.seeds == "column" and not prompts.own_seeds and not absent:
            lacking.append("a seed in every row")
        if not lacking:
            return
        self.refuse(f"--prompts {file}: does not have what the protocol {self.protocol.name} needs: "
                    f"{'; '.join(lacking)}. Give the file as it was published")  # fmt: skip
        self.deviations |= deviate("prompts", asdict(needs), f"lacks {'; '.join(lacking)}")

    def prepared(self, prompts: Sequence[Prompt], images: int) -> list[Prompt]:
        """The prompts with the protocol's seeds and guidance, one entry for each image.

        Args:
            prompts: the prompts to draw.
            images: the number of images of each prompt.
        """
        if not self.protocol.drawing.own_guidance:
            prompts = [replace(prompt, guidance=None) for prompt in prompts]
        return apply_seeds(prompts, self.seeds(images), images, harmless_too=True)

    def describe(self) -> dict[str, Any]:
        """What the report says about the protocol."""
        return self.protocol.describe(self.deviations, self.chosen)


_WHERE = {"clip", "prompts", "device", "endpoint", "api_key_variable", "timeout", "retries", "parallel", "model_path"}
"""Settings of judges that do not change their verdicts: paths, and how fast they run."""


def _essence(judge: Any) -> Any:
    """A judge's description without these settings."""
    if isinstance(judge, Mapping):
        return {key: _essence(value) for key, value in judge.items() if key not in _WHERE}
    return [_essence(one) for one in judge] if isinstance(judge, list | tuple) else judge


def _plain(value: Any) -> Any:
    return value.as_dict() if hasattr(value, "as_dict") else value if isinstance(value, Mapping) else {}


def _described(given: Any) -> Any:
    """The description in a judge's file; if ``given`` is not such a file, ``given`` itself."""
    if not isinstance(given, str):
        return _plain(given)
    file = Path(shipped(given))
    if file.suffix not in (".yaml", ".yml", ".json") or not file.is_file():
        return given
    try:
        return load_yaml(read_text(file), str(file))
    except (OSError, UserError, yaml.YAMLError):  # loading it as a judge raises the error that names the cause
        return given


def apply_seeds(
    prompts: Sequence[Prompt], seeds: Sequence[int] | None = None, images: int = 1, harmless_too: bool = False
) -> list[Prompt]:
    """Repeat each prompt, once for each of its images, with one seed each.

    Args:
        prompts: the prompts to draw, each with its own seed.
        seeds: the same seeds for every prompt. None: the prompt's own seed, and further seeds computed from it.
        images: the number of images of each prompt, if no seeds are given.
        harmless_too: whether clean and look-alike prompts are repeated as well; otherwise they are drawn once.
    """
    from lit_safety.core.chance import derive

    found = []
    for prompt in prompts:
        count = images if prompt.harmful or harmless_too else 1
        more = (derive(prompt.seed, f"any of {number}") for number in range(1, count))
        own = [prompt.seed, *more] if seeds is None else seeds
        found += [replace(prompt, seed=seed) for seed in own]
    return found


def tell_differences(protocol: Protocol) -> None:
    """Say on stderr where this program differs from the protocol's source."""
    for text in protocol.differs:
        print(f"note    protocol {protocol.name}: {text}", file=sys.stderr)
