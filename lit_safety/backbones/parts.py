"""The components of a pipeline, each loaded when it is first used: what a cache replaces is never loaded."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_safety.backbones.hub import hub_file, hub_part
from lit_safety.backbones.pipeline_index import LIBRARIES, pipeline_index
from lit_safety.bounded import load_json
from lit_safety.errors import UserError


def weights_variant(source: str | Path) -> str | None:
    """`fp16` for a folder that holds its weights only under that name."""
    weights = [file.name for file in Path(source).glob("*/*.safetensors")]
    return "fp16" if weights and all(".fp16." in name for name in weights) else None


class Parts:
    """A pipeline's components by name, frozen, in fp32 and from safetensors only.

    It is no module, and a backbone that holds one does not register what is in it: checkpoints, DDP, FSDP and ZeRO
    never see the frozen encoders.

    Args:
        source: a pipeline folder or a hub id.

    Raises:
        UserError: if ``source`` is neither.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.index = pipeline_index(source)
        self._loaded: dict[str, Any] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that have been used so far."""
        return tuple(self._loaded)

    def has(self, name: str) -> bool:
        """Whether the pipeline ships the component ``name``."""
        return name in self.index.components

    def get(self, name: str, device: torch.device | None = None) -> Any:
        """The component ``name``, loaded if it was not yet, networks moved to ``device`` if one is given.

        Raises:
            UserError: if the pipeline has no such component, or its files are missing or do not load.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        part = self._loaded[name]
        if device is not None and isinstance(part, nn.Module) and next(part.parameters()).device != device:
            part.to(device)
        return part

    def fetch(self) -> Path:
        """The folder with all components in it; those of a hub id are fetched where they were not yet.

        Raises:
            UserError: the hub does not give them.
        """
        if not self.index.is_local:
            for name in self.index.components:
                hub_part(self.source, name, self.index.folder)
        return self.index.folder

    def config(self, name: str) -> dict[str, Any]:
        """The `config.json` of the network ``name``, without its weights.

        Raises:
            UserError: if it is missing or no JSON object.
        """
        try:
            if self.index.is_local:
                file = self.index.folder / name / "config.json"
            else:
                file = hub_file(self.source, f"{name}/config.json", self.index.folder.name)
            config = load_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"the pipeline {self.source} does not load: {name}/config.json: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"the pipeline {self.source} does not load: {file} holds no JSON object")
        return config

    def _load(self, name: str) -> Any:
        if name not in self.index.components:
            raise UserError(f"the pipeline {self.source} does not load: its model_index.json names no {name}")
        library, class_name = self.index.components[name]
        if library not in LIBRARIES:
            raise UserError(
                f"the pipeline {self.source} does not load: its {name} is of the library {library!r}; "
                f"components come from {' and '.join(LIBRARIES)}"
            )
        found = getattr(import_module(library), class_name, None)
        if found is None:
            raise UserError(f"the pipeline {self.source} does not load: {library} has no {class_name} (its {name})")
        try:
            return self._from_pretrained(found, name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise UserError(f"the pipeline {self.source} does not load: its {name}: {reason}") from error

    def _from_pretrained(self, found: Any, name: str) -> Any:
        index = self.index
        folder = index.folder / name if index.is_local else hub_part(self.source, name, index.folder)
        if not issubclass(found, nn.Module):
            return found.from_pretrained(folder)
        weights = [file.name for file in folder.glob("*.safetensors")]
        variant = "fp16" if weights and all(".fp16." in file for file in weights) else None
        network = found.from_pretrained(folder, dtype=torch.float32, variant=variant, use_safetensors=True)
        return network.requires_grad_(False).eval()


class NoDenoiser(nn.Module):
    """Stands where a denoiser would, for work that needs the encoders only; it follows `.to(device)`."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)
