"""Statistics that are kept with a merge, so that an expert can be added later without the data of the others.

`statistics/` holds the measured Gram matrices of every expert and of what must stay, the experts' own factors, and
`statistics.json`: how they were measured, on which base model, and the sha256 of every file. Clean prompts are stored
as text; an expert's prompts are stored only as hashes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones.fingerprint import part_hashes
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import file_sha256
from lit_safety.core.text import load_json
from lit_safety.core.weights import open_safetensors
from lit_safety.merging.experts import Expert
from lit_safety.merging.grams import Halves
from lit_safety.merging.options import CalibrationOptions

FOLDER = "statistics"
INDEX = "statistics.json"
FORMAT = "lit_safety statistics 1"
HOW = ("each", "steps", "guidance", "batch_size", "seed")
"""Options of the calibration that decide the numbers; a later expert is measured with the same ones."""
ADD_TO = "--add_to"


def fingerprint(pipeline: str, denoiser: str, encoders: Sequence[str]) -> dict[str, str]:
    """Hashes of all parts of a base model that decide its layers' inputs."""
    return part_hashes(pipeline, [denoiser, "scheduler", *encoders])


def prompt_hash(prompt: str) -> str:
    """The hash that is stored instead of a prompt's text."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass
class KeptExpert:
    """What is kept for one expert in addition to its Gram matrices."""

    expert: Expert
    weight: float
    category: str | None
    """The category or file of the prompts on which it was measured."""
    prompts: list[str]
    """Hashes of these prompts."""
    file: str = ""
    """sha256 of its factors."""


class Keeper:
    """Writes statistics into a folder while they are measured.

    Args:
        folder: is created.
        kept: earlier statistics; their files are copied.
    """

    def __init__(self, folder: Path, kept: KeptStatistics | None = None) -> None:
        self.folder = folder
        self._inputs: list[dict[str, Any]] = []
        self._experts: list[dict[str, Any]] = []
        self._hashes: dict[str, str] = {}
        with self._writing():
            folder.mkdir(parents=True)
        if kept is not None:
            self._inputs, self._experts = list(kept.index["inputs"]), list(kept.index["experts"])
            self._hashes = dict(kept.index["files"])
            for name in self._hashes:
                with self._writing():
                    shutil.copyfile(kept.folder / name, folder / name)

    def add(self, who: str | None, halves: Mapping[tuple[str, ...], Halves]) -> None:
        """Keep the statistics of some inputs, by the layers that read each input."""
        tensors = {}
        for layers, one in halves.items():
            tensors[f"conditional.{layers[0]}"] = one.conditional
            if one.unconditional is not None:
                tensors[f"unconditional.{layers[0]}"] = one.unconditional
        file = self._write("grams", tensors)
        self._inputs += [{"of": who, "file": file, "layers": list(layers)} for layers in halves]

    def finish(
        self,
        experts: Iterable[KeptExpert],
        clean: Sequence[str],
        options: CalibrationOptions,
        base: Mapping[str, str],
    ) -> Path:
        """Write the new experts' factors and the index; returns the folder.

        Args:
            experts: the experts that were measured now.
            clean: prompts of what must stay.
            options: how images were drawn.
            base: the base model's fingerprint.
        """
        for one in experts:
            factors: dict[str, Tensor] = {}
            for name, part in one.expert.layers.items():
                factors |= {f"a.{name}": part.a, f"b.{name}": part.b}
            file = self._write("factors", factors)
            self._experts.append(
                {
                    "name": one.expert.name,
                    "file": file,
                    "weight": one.weight,
                    "category": one.category,
                    "prompts": list(one.prompts),
                    "provenance": dict(one.expert.provenance),
                    "layers": {n: {"scale": p.scale, "kernel": p.kernel} for n, p in one.expert.layers.items()},
                }
            )
        index = {
            "format": FORMAT,
            "base": dict(base),
            "options": {key: getattr(options, key) for key in HOW},
            "clean": list(clean),
            "experts": self._experts,
            "inputs": self._inputs,
            "files": self._hashes,
        }
        with self._writing():
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        return self.folder

    def _write(self, kind: str, tensors: Mapping[str, Tensor]) -> str:
        name = f"{kind}-{len(self._hashes)}.safetensors"
        # a copy, because q, k and v of a layer can share a factor
        content = save({key: one.detach().clone().contiguous() for key, one in tensors.items()})
        with self._writing():
            (self.folder / name).write_bytes(content)
        self._hashes[name] = file_sha256(self.folder / name)
        return name

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"statistics cannot be written to {self.folder} ({error.strerror or error})") from error


@dataclass
class KeptStatistics:
    """Kept statistics; Gram matrices are read only when they are needed."""

    folder: Path
    index: Mapping[str, Any]
    experts: list[KeptExpert]
    _of: dict[tuple[str | None, str], tuple[str, str]] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for one in self.index["inputs"]:
            for layer in one["layers"]:
                self._of[one["of"], layer] = one["file"], one["layers"][0]

    @property
    def clean(self) -> list[str]:
        """Prompts of what must stay."""
        return list(self.index["clean"])

    def holds(self, who: str | None, layers: Sequence[str]) -> bool:
        """Whether an input was measured; see `grams.Kept`."""
        return any((who, layer) in self._of for layer in layers)

    def halves(self, who: str | None, layers: Sequence[str]) -> Halves:
        """The statistics of an input."""
        file, first = next(self._of[who, layer] for layer in layers if (who, layer) in self._of)
        wanted = (f"conditional.{first}", f"unconditional.{first}")
        found = _tensors(self.folder, file, self.index["files"], self._checked, wanted)
        return Halves(found[wanted[0]], found.get(wanted[1]))

    def check_base(self, base: Mapping[str, str]) -> None:
        """Refuse another base model than the one on which they were measured.

        Raises:
            UserError: the message names the parts that differ.
        """
        then = self.index["base"]
        if other := sorted(part for part in {*then, *base} if then.get(part) != base.get(part)):
            raise UserError(
                f"{ADD_TO} {self.folder.parent}: its statistics were measured on another base model "
                f"({', '.join(other)} differ); give the one that it was merged for as --pipeline, or merge all "
                "experts again"
            )

    def options(self, given: CalibrationOptions) -> CalibrationOptions:
        """The given options, with the kept values for those that decide the numbers.

        Raises:
            UserError: an option was given with another value.
        """
        usual = CalibrationOptions()
        for key in HOW:
            then, now = self.index["options"][key], getattr(given, key)
            if now not in (then, getattr(usual, key)):
                raise UserError(
                    f"--calibration.{key} {now}: the statistics in {self.folder.parent} were measured with {then}; "
                    "leave it out, or merge all experts again"
                )
        return replace(given, **self.index["options"])


def read_kept(merge: Path) -> KeptStatistics:
    """The statistics that are kept with a merge, with the experts' factors.

    Raises:
        UserError: the merge keeps no statistics, or a file is missing or damaged.
    """
    folder = merge / FOLDER
    file = folder / INDEX
    if not file.is_file():
        raise UserError(
            f"{ADD_TO} {merge}: keeps no statistics ({FOLDER}/{INDEX} is missing); merge its experts again with "
            "--keep_statistics true"
        )
    try:
        index = load_json(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        if any(name != Path(name).name or not name.endswith(".safetensors") for name in index["files"]):
            raise ValueError("it names files outside of its folder")
        if set(index["options"]) != set(HOW) or not all(isinstance(one, str) for one in index["clean"]):
            raise ValueError("its options or clean prompts are missing")
        experts = [_expert(folder, one, index["files"]) for one in index["experts"]]
        return KeptStatistics(folder, index, experts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: is not a readable index of statistics ({error}); merge all experts again") from error


def _expert(folder: Path, one: Mapping[str, Any], files: Mapping[str, str]) -> KeptExpert:
    tensors = _tensors(folder, one["file"], files, set())
    layers = {
        name: LowRank(tensors[f"a.{name}"], tensors[f"b.{name}"], float(said["scale"]), tuple(said["kernel"]))
        for name, said in one["layers"].items()
    }
    expert = Expert(str(one["name"]), layers, one["provenance"])
    return KeptExpert(expert, float(one["weight"]), one["category"], list(one["prompts"]), one["file"])


def _tensors(
    folder: Path, name: str, files: Mapping[str, str], checked: set[str], wanted: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, those of ``wanted`` or all; its sha256 is checked once."""
    path = folder / name
    if name not in checked:
        if not path.is_file():
            raise UserError(f"{path}: is missing; copy the folder again, or merge all experts again")
        if file_sha256(path) != files[name]:
            raise UserError(f"{path}: is not the file that was written (its sha256 differs); copy the folder again")
        checked.add(name)
    with open_safetensors(path) as handle:
        names = [key for key in handle.keys() if wanted is None or key in wanted]  # noqa: SIM118
        return {key: handle.get_tensor(key) for key in names}


@contextmanager
def keeping(out: Path, wanted: bool, kept: KeptStatistics | None = None) -> Iterator[Keeper | None]:
    """A keeper that writes to a folder next to ``out``, from where files are moved into it; None if nothing is kept."""
    if not wanted:
        yield None
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = TemporaryDirectory(prefix=f".{out.name}-statistics-", dir=out.parent)
    except OSError as error:
        raise UserError(f"{out}: its statistics cannot be written ({error.strerror or error})") from error
    with work as folder:
        yield Keeper(Path(folder) / FOLDER, kept)


class Used(Collection[str]):
    """Prompts that were used in the measurement; for some only the hash is known."""

    def __init__(self, prompts: Iterable[str], hashes: Iterable[str] = ()) -> None:
        self._hashes = {*map(prompt_hash, prompts), *hashes}

    def __contains__(self, prompt: object) -> bool:
        return isinstance(prompt, str) and prompt_hash(prompt) in self._hashes

    def __iter__(self) -> Iterator[str]:
        return iter(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)
