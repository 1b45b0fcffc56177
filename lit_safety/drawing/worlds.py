"""Which prompts, judges and pipelines belong to an embedded world: figures with them are wrong for another model.


A world's folder holds `world.json`: its name and the marks of its pipelines. All files in that folder belong to the
world, by any path or link. The embedded worlds' files are also recognised by their content, so that a copy of one does
not count as the user's own. A pipeline belongs to the world if it bears one of its marks; this is also true for every
adapter on it and every merged or further trained copy. A mark is the vocabulary of a tokenizer, if the world has one of
its own, or a text encoder's table of token embeddings, which no training here moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json, load_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_safety.drawing.prompts import Prompt


MARKER = "world.json"


@dataclass(frozen=True)
class World:
    """An embedded world."""

    name: str
    marks: frozenset[str]
    """Those of `marks` that only its pipelines bear."""
    weights: frozenset[str] = frozenset()
    """sha256 of `model.safetensors` of its judges, its cost model and its CLIP, for copies at any path."""
    seeds: range = range(0)
    """Seeds of its prompts; other prompt files do not use them."""


TOYWORLD = World(
    "toyworld",
    frozenset({"047beffe9348b15a9fb6a2e3c6bce7281b980c55778f455de3099a90b70d6d3a"}),
    frozenset(
        {
            "a09a9262858da9bf9ddf75143acb25f1ffbe0fa051d1d3188de68666c4053b61",  # judge
            "fb883f17019bf378c8d277af8f252403c4a5a48efb71ac53570e332e7d4e772d",  # judge_b
            "f45fc8153f0be45f976f6255b2cf5900e4536ccf29270e9c8be34890200c0376",  # judge of 0.2, which does not count
            "e171208728fb73d0ab164e9d0ff85e5f953b6d7cb6e8a8f50c59edc3a9418f8d",  # judge_b of 0.2
            "40f84624dd13d3431f61ab1c95762873e86382fb1a099a0685fa3bd0b590d712",  # cost_model
            "bc59c6316cbb5215896effa6fe79ce14186644541352ad20bbb75c5a4f9bc44a",  # clip
        }
    ),
    range(80_000_000, 90_000_000),
)


WORLDS = (TOYWORLD,)
_WIDEST = 256
"""Of a table of token embeddings that may be a world's; larger ones belong to real models, and are not read."""


def write_marker(folder: Path, name: str, pipeline: Path, own_words: bool = True) -> None:
    """Write `world.json` into a world's folder.

    Args:
        folder: the world's.
        name: of the world.
        pipeline: a pipeline of it.
        own_words: its tokenizers' vocabulary is its own; false: it is that of real models too, and no mark.
    """
    found = vocabularies(pipeline) if own_words else embeddings(pipeline)
    about = {"world": name, "vocabularies" if own_words else "embeddings": sorted(found)}
    (folder / MARKER).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def marks(pipeline: Path) -> set[str]:
    """What a pipeline may be known by: `vocabularies` and `embeddings`."""
    return vocabularies(pipeline) | embeddings(pipeline)


def vocabularies(pipeline: Path) -> set[str]:
    """A hash of each tokenizer's words and their numbers, for any form of its files; a tokenizer that cannot be read is
    left out."""
    found = set()
    for folder in pipeline.glob("tokenizer*/"):
        for file in (folder / "tokenizer.json", folder / "vocab.json"):
            try:
                words: Any = load_json(file.read_bytes())
                words = words["model"]["vocab"] if file.name == "tokenizer.json" else words
                # T5's is a list of words and scores, in order
                pairs = sorted(words.items()) if isinstance(words, dict) else [word for word, _ in words]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            found.add(hashlib.sha256(json.dumps(pairs).encode()).hexdigest())
            break
    return found


def embeddings(pipeline: Path) -> set[str]:
    """A hash of each small text encoder's table of token embeddings, in float16, whatever type it is stored in."""
    found = set()
    for file in pipeline.glob("text_encoder*/*.safetensors"):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    if not name.endswith("token_embedding.weight") or weights.get_slice(name).get_shape()[1] > _WIDEST:
                        continue
                    table = weights.get_tensor(name).half().contiguous()
                    found.add(hashlib.sha256(table.numpy().tobytes()).hexdigest())
        except (OSError, SafetensorError, IndexError):  # whoever loads it says what is wrong
            continue
    return found


def of_a_world(pipeline: Path) -> bool:
    """Whether a pipeline belongs to an embedded world, whose images are harmless."""
    borne = marks(pipeline)
    return any(borne & world.marks for world in WORLDS)


def world_of(path: str | Path) -> World | None:
    """The world that a file or folder belongs to, by its path or its weights; None: no world."""
    try:
        found = Path(path).resolve()
    except (OSError, RuntimeError):  # a link to itself
        return None
    for folder in (found, *found.parents):
        if (marked := _marked(folder / MARKER)) is not None:
            return marked
    weights = found / "model.safetensors"
    if not weights.is_file():
        return None
    digest = _sha256(weights)
    return next((world for world in WORLDS if digest in world.weights), None)


def foreign_world(pipeline: Path, file: str | Path) -> str | None:
    """The name of the embedded world that the file belongs to, if the pipeline does not belong to it; else None.

    The shipped configs name files in `data/`, which is not there without a checkout: such a path counts too.
    """
    world = world_of(file)
    if world is None and not Path(file).exists():
        world = next((one for one in WORLDS if Path(file).parts[:2] == ("data", one.name)), None)
    return None if world is None or marks(pipeline) & world.marks else world.name


def check_world(
    pipeline: Path,
    files: Mapping[str, str | Path | Iterable[str | Path] | None],
    allowed: bool,
    key: str = "--other_world true",
    prompts: Sequence[Prompt] = (),
) -> None:
    """Refuse a world's prompts and judges for a pipeline that does not belong to this world.

    Args:
        pipeline: the folder of the base pipeline.
        files: option -> what it names: a file, a folder, a file that describes a judge, several of them, or None.
        allowed: the user asked for it, so nothing is refused.
        key: the option that asks for it, for the message.
        prompts: the content of the prompt file, which is the first of `files`.

    Raises:
        UserError: names the file, the world and the key.
    """
    if allowed:
        return
    own = marks(pipeline)
    for option, given in files.items():
        paths = [] if given is None else [given] if isinstance(given, str | Path) else list(given)
        for path in paths:
            worlds = {world.name: world for one in _named(path) if (world := world_of(one)) is not None}
            for world in WORLDS if prompts and option == next(iter(files)) else ():
                if all(one.seed in world.seeds for one in prompts):
                    worlds.setdefault(world.name, world)
            for world in worlds.values():
                if not own & world.marks:
                    if not vocabularies(pipeline):
                        _check_tokenizers(pipeline)
                    raise UserError(
                        f"{option} {path}: belongs to the embedded world {world.name}, and the pipeline {pipeline} "
                        "does not, so a figure would be meaningless: give your own prompts and judges, "
                        f"or ask for it with {key}"
                    )


def _check_tokenizers(pipeline: Path) -> None:
    """A pipeline whose tokenizer cannot be read may be the world's own, so the tokenizer's error is reported first.

    Raises:
        UserError: names the file.
    """
    from lit_safety.backbones.parts import Parts

    parts = Parts(str(pipeline), key="--pipeline")
    parts.check_files([name for name in parts.index.components if "tokenizer" in name])


def _named(path: str | Path) -> Iterator[str | Path]:
    """A file or folder, and the paths in a file that describes a judge."""
    yield path
    file = Path(path)
    if file.suffix in (".yaml", ".yml", ".json") and file.is_file():
        import yaml

        try:
            yield from paths_in(load_yaml(file.read_bytes(), str(file)))
        except (OSError, yaml.YAMLError):  # reported when it is read as a judge
            return


def paths_in(value: object) -> Iterator[str]:
    """The texts in nested lists and mappings that are paths on this machine."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        elif isinstance(one, str) and one and "\n" not in one and len(one) < 4096 and "\0" not in one:
            try:
                if Path(one).exists():
                    yield one
            except OSError:  # too long for a file name
                continue


def _marked(file: Path) -> World | None:
    try:
        about = load_json(file.read_bytes())
        found = [*about.get("vocabularies", []), *about.get("embeddings", [])]
        return World(str(about["world"]), frozenset(map(str, found)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


NOT_FOR_CHOICES = ("test", "judge_b")
"""Names of an embedded world's files that only reports may use."""


def refuse_reports_own(source: str | Path | Iterable[str | Path], key: str) -> None:
    """Refuse to select anything by files of an embedded world that only reports may use.

    Args:
        source: files and folders.
        key: the option that they were given by, for the message.

    Raises:
        UserError: one is a world's test prompts or shards, or its second judge.
    """
    for one in [source] if isinstance(source, str | Path) else source:
        if Path(one).resolve().stem in NOT_FOR_CHOICES and world_of(one) is not None:
            raise UserError(
                f"{key} {one}: this world's reports use it, so it must not be used for a selection; give its "
                "prompts/val.csv (and the folder judge)"
            )
