"""Reads a pipeline's `model_index.json`: the classes of the pipeline and of its components."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_safety.backbones.hub import hub_file
from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json
from lit_safety.core.weights import is_hidden, is_pointer, read_header

#: The YAML key with which most commands get a pipeline.
KEY = "model.init_args.pretrained"
#: Endings of single-file checkpoints.
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
#: The libraries from which components' classes may come. The index is data: it must not choose other imports.
LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class PipelineIndex:
    """A pipeline's class and components, read before any weight."""

    source: str
    """The folder or hub id as it was given."""
    folder: Path
    """The folder of the index; for a hub id the hub's cache, which holds the files that were fetched so far."""
    class_name: str
    components: dict[str, tuple[str, str]]
    """Name -> (library, class name); components that the pipeline does not contain are left out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The pipeline's settings apart from its components, such as `force_zeros_for_empty_prompt`."""

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()


def pipeline_index(source: str, key: str = KEY) -> PipelineIndex:
    """Read `model_index.json` of a folder or a hub id.

    Args:
        source: the folder or hub id.
        key: its option or YAML key, for messages.

    Raises:
        UserError: ``source`` is neither a pipeline folder nor a reachable hub id; says how to log in, or how to
            convert a single file.
    """
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(_no_index(folder, key))
    elif folder.is_file() or folder.suffix.lower() in SINGLE_FILES:
        raise UserError(_single_file(folder, key))
    else:
        index = hub_file(source, "model_index.json", key=key)
    try:
        stated = load_json(index.read_text(encoding="utf-8-sig"))  # Windows' editors begin with a byte order mark
        name = stated["_class_name"]
        if not isinstance(name, str):
            raise ValueError(f"its _class_name is {name!r}: a custom class, whose code is not run")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if is_pointer(index):
            raise UserError(f"{index} is a pointer of git LFS: run `git lfs pull`, or copy the file") from error
        raise UserError(f"{index} is not a diffusers model index ({error}); is the download complete?") from error
    components = {
        key: (value[0], value[1])
        for key, value in stated.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    if strange := [part for part in components if not part.isidentifier()]:
        raise UserError(f"{index} names the component {strange[0]!r}, which is not a component's name")
    settings = {key: value for key, value in stated.items() if not isinstance(value, list) and not key.startswith("_")}
    return PipelineIndex(source, index.parent, name, components, settings)


def pipeline_class_name(source: str, key: str = KEY) -> str:
    """The pipeline's class name; a few hundred bytes are read.

    Raises:
        UserError: ``source`` is neither a pipeline folder nor a reachable hub id.
    """
    return pipeline_index(source, key).class_name


def _no_index(folder: Path, key: str) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SINGLE_FILES and not is_hidden(path))
    if files:
        return f"{folder} has no model_index.json. {_single_file(files[0], key)}"
    return (
        f"{folder} is not a diffusers pipeline: it has no model_index.json; give as {key} the folder that "
        "`save_pretrained` wrote, or a hub id"
    )


def _single_file(file: Path, key: str) -> str:
    """The message that says how to convert a single-file checkpoint."""
    if not file.is_file():
        return f"{key}: {file} does not exist; give a pipeline's folder as `save_pretrained` writes it, or a hub id"
    if file.suffix.lower() not in SINGLE_FILES:
        return f"{key}: {file} is a file; give a pipeline's folder as `save_pretrained` writes it, or a hub id"
    return (
        f'{file} is a checkpoint in one file; convert it once, `python -c "import diffusers; '
        f"diffusers.{_class_of(file)}.from_single_file({str(file)!r}).save_pretrained('FOLDER')\"`, and give FOLDER as "
        f"{key}"
    )


def _class_of(file: Path) -> str:
    """The pipeline class of a checkpoint, guessed from the names of its tensors if these can be read safely."""
    names: Any = ()
    if file.suffix.lower() == ".safetensors":
        names, _ = read_header(file)
    if any(name.startswith("conditioner.embedders.") for name in names):
        return "StableDiffusionXLPipeline"
    if any(".joint_blocks." in name for name in names):
        return "StableDiffusion3Pipeline"
    return "StableDiffusionPipeline"
