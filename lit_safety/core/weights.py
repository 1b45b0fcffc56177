"""Which weights of a model's folder are read, and whether they are whole. All readers and hashes ask here.

Only safetensors are read. Pickled weights (`.bin`, `.pt`, `.ckpt`) can run code when they are loaded, and one cannot
see what a folder from somebody else contains. A trusted file can be converted once, by one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn


#: The names of weights in diffusers and in transformers.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
#: Variants that are read, the first that exists; "" are files without a variant.
VARIANTS = ("", "fp32", "fp16", "bf16")
#: Weights in formats that can run code, or that only other libraries read.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx", ".gguf")
#: The beginning of a pointer file that git LFS has left in place of the real file.
POINTER = b"version https://git-lfs.github.com/spec/"
#: Endings of names under which older releases stored numbers that are counted, not learned.
COUNTED = (".position_ids", ".inv_freq", ".num_batches_tracked")
MAX_HEADER = 100 << 20  # safetensors' own limit
MAX_INDEX = 64 << 20  # bytes of the index of a model in many files; that of 400 billion parameters has 1 MB

_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors"
)


@dataclass(frozen=True)
class Weights:
    """The weights files of one network."""

    variant: str | None
    """What `from_pretrained` is told as `variant`."""
    names: tuple[str, ...]
    """Of the files, in the order of their numbers."""
    index: str | None = None
    """Of a network in several files: which tensor is in which file."""


def is_hidden(path: Path | str) -> bool:
    """Whether a file was made by the system, not by the user: macOS leaves `._NAME` next to every file on other disks,
    and `.DS_Store` in folders."""
    return Path(path).name.startswith(".")


def choose_weights(names: Iterable[str], stem: str) -> Weights | None:
    """Which of a folder's files are a network's weights: full precision if there is one, else half; None: there are
    none.

    `ema` and `non_ema` are not the weights that draw, so they are never chosen here.

    Args:
        names: the folder's files.
        stem: `DIFFUSERS` or `TRANSFORMERS`.

    Raises:
        UserError: one network lies there both whole and in several files, or a file of several is missing.
    """
    there = {name for name in names if not is_hidden(name)}
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name in sorted(there):
        match = _NAME.fullmatch(name)
        if match is None or match["stem"] != stem:
            continue
        one = (name, int(match["number"] or 0), int(match["count"] or 0))
        found.setdefault(match["variant"] or "", []).append(one)
    for variant in VARIANTS:
        if variant in found:
            index = f"{stem}.safetensors.index.{variant + '.' if variant else ''}json"
            return _one_set(found[variant], variant or None, index if index in there else None)
    return None


def _one_set(files: list[tuple[str, int, int]], variant: str | None, index: str | None) -> Weights:
    whole = [name for name, number, _ in files if not number]
    cut = [(name, number, count) for name, number, count in files if number]
    if whole and cut:
        raise UserError(
            f"{whole[0]} and {cut[0][0]} are both there: two sets of weights of one network; remove the old one"
        )
    if whole:
        return Weights(variant, (whole[0],))
    if len({count for _, _, count in cut}) > 1 and index is None:
        raise UserError(
            f"{cut[0][0]} and {cut[-1][0]} are both there, and the index that says which belong together is missing"
        )
    if index is None:
        count = cut[0][2]
        missing = sorted(set(range(1, count + 1)) - {number for _, number, _ in cut})
        if missing:
            name = re.sub(r"-\d{5}-of", f"-{missing[0]:05d}-of", cut[0][0])
            raise UserError(f"{name} is missing: copy the folder again")
    return Weights(variant, tuple(name for name, _, _ in cut), index)


def weights_of(folder: Path, stem: str) -> Weights | None:
    """`choose_weights` of a folder, with links followed and the index read; None: it has no safetensors.

    Raises:
        UserError: as `choose_weights`; or a file that the index names is missing, or the index is damaged; names the
            folder.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    try:
        found = choose_weights(names, stem)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if found is None or (len(found.names) == 1 and found.index is None):
        return found
    if found.index is None:
        variant = f"{found.variant}." if found.variant else ""
        raise UserError(
            f"{folder}: {stem}.safetensors.index.{variant}json is missing, which says what is in {found.names[0]}: "
            "copy the folder again"
        )
    return Weights(found.variant, _indexed(folder / found.index, set(names)), found.index)


def _indexed(index: Path, there: set[str]) -> tuple[str, ...]:
    """The files that an index names."""
    try:
        if index.stat().st_size > MAX_INDEX:
            raise ValueError(f"it has more than {MAX_INDEX} bytes")
        stated = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        names = tuple(sorted(set(stated.values())))
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError("its weight_map does not name files of its own folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        pointer = ": it is a pointer of git LFS; run `git lfs pull`" if is_pointer(index) else ""
        raise UserError(f"{index} is not a readable index of weights ({_first_line(error)}){pointer}") from error
    for name in names:
        if name not in there:
            raise UserError(f"{index.parent / name} is missing, and {index.name} names it: copy the folder again")
    return names


def need_weights(folder: Path, stem: str) -> Weights:
    """`weights_of`, each file's header checked.

    Raises:
        UserError: as `weights_of`; or there are no safetensors, or one is damaged or a pointer of git LFS.
    """
    found = weights_of(folder, stem)
    if found is None:
        raise UserError(_why_none(folder, stem))
    for name in found.names:
        check_safetensors(folder / name)
    return found


def _why_none(folder: Path, stem: str) -> str:
    names = sorted(path.name for path in folder.iterdir() if not is_hidden(path)) if folder.is_dir() else []
    others = [name for name in names if _NAME.fullmatch(name) and name.startswith(f"{stem}")]
    if others:
        return (
            f"{folder}: {stem}.safetensors is missing, and {others[0]} is another variant, which is not used; to use "
            f"it, copy it to {stem}.safetensors"
        )
    pickled = [name for name in names if name.endswith(OTHER_FORMATS)]
    if pickled:
        return (
            f"{folder}: {stem}.safetensors is missing. {pickled[0]} is not read, since files of this kind can run code "
            "when they are loaded; if you trust it, convert it once: `from_pretrained(FOLDER, use_safetensors=False)"
            ".save_pretrained(NEW_FOLDER)` in diffusers or transformers, and give the new folder"
        )
    return f"{folder}: {stem}.safetensors is missing: copy the folder again"


def is_pickled(file: Path) -> bool:
    """Whether a file is one of `torch.save` or another pickle, by its first bytes: zip, or a pickle's protocol."""
    try:
        with file.open("rb") as stream:
            first = stream.read(4)
    except OSError:
        return False
    return first == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def how_to_convert(file: Path) -> str:
    """The command that makes safetensors of a plain torch file: with `weights_only` no code in it runs."""
    new = file.with_name(f"{file.stem}{'-converted' if file.suffix == '.safetensors' else ''}.safetensors")
    code = (
        f"import torch, safetensors.torch as s; d = torch.load(open({str(file)!r}, 'rb'), 'cpu', weights_only=True); "
        f"s.save_file({{k: t.clone().contiguous() for k, t in d.get('state_dict', d).items()}}, {str(new)!r})"
    )
    return f'convert it once, `python -c "{code}"`'


def is_pointer(file: Path) -> bool:
    """Whether the file is a pointer that git LFS has left in place of the real file."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


@contextmanager
def open_safetensors(file: Path | str) -> Iterator[Any]:
    """`safe_open` for torch tensors. It bounds the header, which could otherwise be deeply nested.

    Raises:
        UserError: the file is missing, damaged or a pointer of git LFS; also for errors while it is read.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, RecursionError) as error:
        raise UserError(not_readable(Path(file), error)) from error


def check_safetensors(file: Path) -> None:
    """Refuse a file whose header is damaged, or in which numbers are missing. The numbers are not read.

    Raises:
        UserError: as `open_safetensors`.
    """
    with open_safetensors(file):
        pass


def not_readable(file: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read, as one line that names it."""
    if is_pointer(file):
        return f"{file} is a pointer of git LFS, not weights: run `git lfs pull` in its clone, or copy the file"
    return f"{file} is not a readable safetensors file: {_first_line(error)}"


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Each tensor's `dtype`, `shape` and `data_offsets`, and the byte at which the numbers begin.

    Raises:
        UserError: as `open_safetensors`.
    """
    check_safetensors(file)  # bounds the depth, and checks types and offsets
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(size))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(not_readable(file, error)) from error
    header.pop("__metadata__", None)
    return header, 8 + size


def check_whole(
    network: nn.Module, report: Mapping[str, Any], folder: Path | str, used: nn.Module | None = None
) -> None:
    """Refuse a network of which a tensor is missing in its file, or a file with other layers or with nan or infinity.

    If only a part of a model is loaded, such as the text half of a CLIP, tensors of its other parts may be left over.

    Args:
        network: just loaded.
        report: what `from_pretrained` gives with `output_loading_info`.
        folder: for messages.
        used: the part of it that computes; None: all of it.

    Raises:
        UserError: naming the first tensor.
    """
    import torch

    parameters = network.named_parameters(remove_duplicate=False)
    own = None if used is None else {id(parameter) for parameter in used.parameters()}
    idle = {name for name, parameter in parameters if own is not None and id(parameter) not in own}
    if missing := sorted(set(report["missing_keys"]) - idle):
        raise UserError(
            f"{folder}: its weights lack {missing[0]}{_more(missing)}, which config.json asks for: they belong to "
            "another model, or are damaged"
        )
    parts = {name for name, _ in network.named_children()}
    prefix = getattr(network, "base_model_prefix", "")
    left = [
        key
        for key in sorted(report["unexpected_keys"])
        if parts & {key.split(".")[0], key.removeprefix(f"{prefix}.").split(".")[0]} and not key.endswith(COUNTED)
    ]
    if left:
        raise UserError(
            f"{folder}: its weights hold {left[0]}{_more(left)}, which is not a layer of the network in config.json: "
            "the weights or config.json belong to another model"
        )
    for name, value in network.state_dict().items():
        if value.is_floating_point() and type(value) is not torch.Tensor:
            value = value.dequantize()  # a tensor of fewer bits, with a class of its own
        # A sum is quick. It may also overflow where very many numbers are very large; then each number is tested.
        doubtful = value.is_floating_point() and not torch.isfinite(value.sum(dtype=torch.float32))
        if doubtful and not torch.isfinite(value.float()).all():
            raise UserError(
                f"{folder}: {name} holds numbers that are not finite (NaN or infinity), so every image would be "
                "broken: use weights from before that happened"
            )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# The weights of a folder that are loaded.


def weight_files(folder: Path) -> list[Path]:
    """The weights in a component's folder that are loaded, of several variants those in full precision; [] if none.

    Raises:
        UserError: as `weights_of`.
    """
    chosen = weights_of(folder, DIFFUSERS) or weights_of(folder, TRANSFORMERS)
    return [] if chosen is None else [folder / name for name in chosen.names]
