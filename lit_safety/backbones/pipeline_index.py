"""What a pipeline folder (or hub id) says of itself in `model_index.json`: its class and its components' classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_safety.backbones.hub import hub_file
from lit_safety.bounded import load_json
from lit_safety.errors import UserError

#: Where components' classes may come from. The index is data: it must not choose what else is imported.
LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class PipelineIndex:
    """A pipeline's class and components, known before any weight is read."""

    source: str
    """The folder or hub id as it was given."""
    folder: Path
    """Where the index lies; of a hub id, the hub's cache, which holds what has been fetched so far."""
    class_name: str
    components: dict[str, tuple[str, str]]
    """Name -> (library, class name); components that the pipeline ships without are left out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the pipeline says of itself beside its components, such as `force_zeros_for_empty_prompt`."""

    absent_text: tuple[str, ...] = ()
    """Text encoders and tokenizers that it says it ships without; stock `from_pretrained` wants each told as None."""

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()


def pipeline_index(source: str) -> PipelineIndex:
    """Read `model_index.json` of a folder or a hub id.

    Raises:
        UserError: if ``source`` is neither a pipeline folder nor a reachable hub id; says how to log in.
    """
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that "
                            "`save_pretrained` wrote, or a hub id")  # fmt: skip
    else:
        index = hub_file(source, "model_index.json")
    try:
        stated = load_json(index.read_text(encoding="utf-8"))
        name = str(stated["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no diffusers model index ({error}); is the download complete?") from error
    components = {
        key: (value[0], value[1])
        for key, value in stated.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    settings = {key: value for key, value in stated.items() if not isinstance(value, list) and not key.startswith("_")}
    absent = [key for key, value in stated.items() if value == [None, None]]
    absent_text = tuple(key for key in absent if key.startswith(("text_encoder", "tokenizer")))
    return PipelineIndex(source, index.parent, name, components, settings, absent_text)


def pipeline_class_name(source: str) -> str:
    """The pipeline's class name; a few hundred bytes are read.

    Raises:
        UserError: if ``source`` is neither a pipeline folder nor a reachable hub id.
    """
    return pipeline_index(source).class_name
