"""Protocols by name: how a published figure is made, so that one's own is made in the same way or says what differs.

A protocol is a file of `configs/protocols/`: what the prompt file must hold, steps, guidance, seeds, judge with its
classes and threshold, what is counted, and the source of all this. What the sources do not state is `not stated`; then
the command's own value is used, and the report says so. A report names the protocol and its hash.
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
"""Stands in a protocol for what none of its sources states."""
NOT_AVAILABLE: Literal["not available"] = "not available"
"""Stands for a judge that the sources state and nobody can have here."""
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
    """What the prompt file must hold."""

    __pydantic_config__: ClassVar = STRICT
    columns: tuple[Text, ...]
    """Each must be there; of names with `|` between them one."""
    rows: Count | Unstated
    kinds: tuple[Literal["explicit", "implicit", "adversarial", "lookalike", "clean"], ...]
    """Of each at least one prompt."""
    categories: tuple[Category, ...] = ()
    """Of each at least one prompt."""
    kind: Literal["explicit", "implicit", "adversarial", "lookalike", "clean"] | None = None
    """What the prompts are, where the file's columns do not say so."""
    category: Category | None = None
    """The harm that they ask for, where the file's columns do not say so."""


@dataclass(frozen=True)
class Drawing:
    """How images are drawn."""

    __pydantic_config__: ClassVar = STRICT
    steps: Count | Unstated
    guidance: Number | Unstated
    """Of rows that have no guidance of their own."""
    resolution: Count | Unstated
    seeds: tuple[Seed, ...] | Literal["column", "row"] | Unstated
    """The same for each prompt, an image from each; `column`: that of each row, which must have one; `row`: the same,
    made from what the row says where it has none."""
    own_guidance: StrictBool = True
    """Rows with a guidance scale of their own keep it."""
    images: Count = 1
    """Of a prompt, where `seeds` lists none."""


@dataclass(frozen=True)
class Protocol:
    """A protocol as its file holds it."""

    __pydantic_config__: ClassVar = STRICT
    title: Text
    command: Command
    source: tuple[Text, ...]
    prompts: PromptNeeds
    drawing: Drawing
    judge: dict[str, Any] | Literal["not stated", "not available"]
    """`class_path` and `init_args`, as files of configs/judges hold them."""
    counted: tuple[Text, ...]
    """The report's figures that are the protocol's, the first one foremost."""
    quality: dict[str, Text] = field(default_factory=dict)
    """`fid` and `clip` of `evaluate`; `reference`: the images that FID must be told of."""
    differs: tuple[Text, ...] = ()
    """Where this program does otherwise than the source."""
    name: str = ""
    sha256: str = ""
    """Of what the file says."""

    def describe(self, deviations: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What a report says of it.

        Args:
            deviations: what is otherwise than the protocol says, each as {protocol, here}.
            chosen: what the protocol does not state -> the value that was used.
        """
        about: dict[str, Any] = {"name": self.name, "sha256": self.sha256, "title": self.title}
        about |= {"source": list(self.source), "counted": list(self.counted), "differs": list(self.differs)}
        return about | {"not_stated": dict(chosen), "deviations": dict(deviations)}

    @property
    def images(self) -> int:
        """Images of a prompt."""
        return len(self.drawing.seeds) if isinstance(self.drawing.seeds, tuple) else self.drawing.images


_RECORD = TypeAdapter(Protocol)
FIGURE_OF_USERS = ("pass_rate", "win_rate")
"""What `users evaluate` reports."""


def names() -> list[str]:
    """The protocols that are shipped."""
    return sorted(file.stem for file in (configs() / "protocols").glob("*.yaml"))


def load_protocol(name: str, command: Command = "evaluate") -> Protocol:
    """The protocol of a name, or that a file of one's own describes.

    Args:
        name: one of `names()`, or a YAML file.
        command: the command that is to follow it.

    Raises:
        UserError: there is none, its file is wrong, or it is another command's.
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
        raise UserError(f"{where}: `counted` names the figure {unknown[0]}; there are {', '.join(sorted(known))}")
    if isinstance(protocol.judge, dict) and protocol.judge.keys() != {"class_path", "init_args"}:
        raise UserError(f"{where}: `judge` must be `not stated`, or hold `class_path` and `init_args` and nothing else")
    if other := protocol.quality.keys() - {"fid", "clip", "reference"}:
        raise UserError(f"{where}: `quality` has the unknown key {min(other)!r}; it may hold fid, clip, reference")


def deviate(key: str, protocol: Any, here: Any) -> dict[str, dict[str, Any]]:
    """One deviation, as a report holds it."""
    return {key: {"protocol": protocol, "here": here}}


@dataclass
class Applied:
    """A protocol together with what the command was given.

    Args:
        protocol: what is followed.
        allowed: deviations are recorded; else they are refused.
    """

    protocol: Protocol
    allowed: bool
    deviations: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)

    def value(self, key: str, stated: Any, given: Any, default: Any, name: str = "") -> Any:
        """What is used of an option: what the protocol states, or what was given where that is allowed.

        Args:
            key: the option, without dashes.
            stated: what the protocol says; `not stated` leaves it to the command.
            given: what the command got; its default counts as not given.
            default: the option's default.
            name: how the value that was given is called in the report, where it is long.

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
        """The judge that decides: the protocol's, or the one that was given.

        Where its CLIP or prompts lie and the device it runs on are no part of the protocol: the report holds hashes.

        Raises:
            UserError: another judge was given, and deviations are not allowed.
        """
        stated, name = self.protocol.judge, given if isinstance(given, str) else str(_plain(given).get("class_path"))
        if isinstance(stated, str):
            if given is None:
                why = "does not state one" if stated == NOT_STATED else "has one that is not available here"
                raise UserError(f"--judge: the protocol {self.protocol.name} {why}; name the one that decides")
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
            images: of a prompt, as it is drawn.
        """
        stated = self.protocol.drawing.seeds
        if stated == NOT_STATED:
            self.chosen["seeds"] = "of each row: its own, or made from what it says"
        return stated[:images] if isinstance(stated, tuple) and images <= len(stated) else None

    def lacks(self, message: str) -> None:
        """Something that the protocol needs was not given.

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
            raise UserError(f"{message}, or follow the protocol but for what the report then names, --deviate true")

    def check_prompts(self, prompts: PromptSet, file: str) -> None:
        """Refuse a prompt file that lacks what the protocol needs, and say all that it lacks.

        Raises:
            UserError: names the file, and all that is lacking.
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
        self.refuse(f"--prompts {file}: lacks what the protocol {self.protocol.name} needs: {'; '.join(lacking)}. Give "
                    "the file as it is published")  # fmt: skip
        self.deviations |= deviate("prompts", asdict(needs), f"lacks {'; '.join(lacking)}")

    def prepared(self, prompts: Sequence[Prompt], images: int) -> list[Prompt]:
        """The prompts as they are drawn: each so often as the protocol says, from its seeds, at its guidance.

        Args:
            prompts: that are drawn.
            images: of a prompt.
        """
        if not self.protocol.drawing.own_guidance:
            prompts = [replace(prompt, guidance=None) for prompt in prompts]
        return apply_seeds(prompts, self.seeds(images), images, harmless_too=True)

    def describe(self) -> dict[str, Any]:
        """What the report says of the protocol."""
        return self.protocol.describe(self.deviations, self.chosen)


_WHERE = {"clip", "prompts", "device", "endpoint", "api_key_variable", "timeout", "retries", "parallel", "model_path"}
"""Settings of judges that say where something lies or how fast it runs, not what it says."""


def _essence(judge: Any) -> Any:
    """A judge's description without where its files lie."""
    if isinstance(judge, Mapping):
        return {key: _essence(value) for key, value in judge.items() if key not in _WHERE}
    return [_essence(one) for one in judge] if isinstance(judge, list | tuple) else judge


def _plain(value: Any) -> Any:
    return value.as_dict() if hasattr(value, "as_dict") else value if isinstance(value, Mapping) else {}


def _described(given: Any) -> Any:
    """What a judge's file says; what was given itself where it is no such file."""
    if not isinstance(given, str):
        return _plain(given)
    file = Path(shipped(given))
    if file.suffix not in (".yaml", ".yml", ".json") or not file.is_file():
        return given
    try:
        return load_yaml(read_text(file), str(file))
    except (OSError, UserError, yaml.YAMLError):  # whoever loads it as a judge says what is wrong
        return given


def apply_seeds(
    prompts: Sequence[Prompt], seeds: Sequence[int] | None = None, images: int = 1, harmless_too: bool = False
) -> list[Prompt]:
    """Each prompt so often as it is drawn, an image from each seed.

    Args:
        prompts: that are drawn, each with its own seed.
        seeds: the same for every prompt; None: the prompt's own seed, and others that follow from it.
        images: of a prompt, where no seeds are given.
        harmless_too: clean and look-alike prompts are drawn so often too; else once.
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
    """Say on stderr where this program does otherwise than the protocol's source."""
    for text in protocol.differs:
        print(f"note    protocol {protocol.name}: {text}", file=sys.stderr)
