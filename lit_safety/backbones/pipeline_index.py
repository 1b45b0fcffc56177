"""What a pipeline folder (or hub id) says of itself in `model_index.json`: its class and its components' classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()


def pipeline_index(source: str) -> PipelineIndex:
    """Read `model_index.json` of a folder or a hub id.

    Raises:
        UserError: if ``source`` is neither a pipeline folder nor a reachable hub id.
    """
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that "
                            "`save_pretrained` wrote, or a hub id")  # fmt: skip
    else:
        index = _index_from_hub(source)
    try:
        stated = json.loads(index.read_text(encoding="utf-8"))
        name = str(stated["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no diffusers model index ({error}); is the download complete?") from error
    components = {
        key: (value[0], value[1])
        for key, value in stated.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    return PipelineIndex(source, index.parent, name, components)


def pipeline_class_name(source: str) -> str:
    """The pipeline's class name; a few hundred bytes are read.

    Raises:
        UserError: if ``source`` is neither a pipeline folder nor a reachable hub id.
    """
    return pipeline_index(source).class_name


def _index_from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "model_index.json"))
    except HFValidationError as error:
        raise UserError(f"no folder {source!r}, and it is no hub id either: check `model.pretrained`") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"no folder {source!r}, and the hub did not give it ({type(error).__name__}): check the path; for a gated "
            "model accept its licence and run `hf auth login`; offline, point at a local folder"
        ) from error
