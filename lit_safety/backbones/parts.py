"""The components of a pipeline, each loaded when it is first used, so that what a cache replaces is never loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from lit_safety.backbones.hub import hub_answers, hub_file, hub_part
from lit_safety.backbones.pipeline_index import KEY, LIBRARIES, pipeline_index
from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json
from lit_safety.core.tokenizers import check_tokenizer, check_tokenizer_files, read_config
from lit_safety.core.weights import DIFFUSERS, TRANSFORMERS, check_whole, need_weights

#: Components that a pipeline can name but does not need for drawing from text.
BESIDE = ("safety_checker", "feature_extractor", "image_encoder")


class Parts:
    """A pipeline's components by name, frozen, and only from safetensors. Every command loads pipelines in this way.

    It is not a module, and a backbone does not register its components, so checkpoints, DDP, FSDP and ZeRO never see
    the frozen encoders.

    Args:
        source: a pipeline folder or a hub id.
        dtype: the dtype of its networks.
        key: its option or YAML key, for messages.

    Raises:
        UserError: ``source`` is neither.
    """

    def __init__(self, source: str, dtype: torch.dtype = torch.float32, key: str = KEY) -> None:
        self.source = source
        self.dtype = dtype
        self.dtypes: dict[str, torch.dtype] = {}
        """The dtype of single networks that differ from `dtype`; set it before they are loaded."""
        self.quantizations: dict[str, str] = {}
        """The kind of `settings.Quantization` of single networks; also set it before they are loaded."""
        self.index = pipeline_index(source, key)
        self._loaded: dict[str, Any] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that have been used so far."""
        return tuple(self._loaded)

    def has(self, name: str) -> bool:
        """Whether the pipeline ships the component ``name``."""
        return name in self.index.components

    def get(self, name: str, device: torch.device | None = None) -> Any:
        """The component ``name``, loaded if necessary; networks are moved to ``device`` if one is given.

        Raises:
            UserError: the pipeline has no such component, or its files are missing or do not load.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        part = self._loaded[name]
        if device is not None and isinstance(part, nn.Module) and next(part.parameters()).device != device:
            part.to(device)
        return part

    def put(self, name: str, part: Any) -> None:
        """From now on use ``part`` as the component ``name`` instead of the pipeline's own."""
        self._loaded[name] = part

    def fetch(self) -> Path:
        """The folder with all components; those of a hub id are fetched if necessary.

        Raises:
            UserError: the hub does not give them.
        """
        if not self.index.is_local:
            for name in self.index.components:
                hub_part(self.source, name, self.index.folder)
        return self.index.folder

    def check_files(self, names: Iterable[str]) -> None:
        """Check that the files of components exist that will be needed later. No weight is read.

        A hub id is not checked while the hub answers: missing files are fetched when they are used.

        Raises:
            UserError: a file is missing or damaged; names it.
        """
        if not self.index.is_local and hub_answers():
            return
        for name in names:
            found, folder = self.class_of(name), self.index.folder / name
            try:
                if not folder.is_dir():
                    raise UserError(f"there is no folder {folder}")
                if issubclass(found, nn.Module):
                    need_weights(folder, _stem(found))
                elif "tokenizer" in name:
                    check_tokenizer_files(folder, found)
            except UserError as error:
                raise UserError(self._told(f"its {name}: {error}")) from error

    def config(self, name: str) -> dict[str, Any]:
        """The `config.json` of the network ``name``, without its weights.

        Raises:
            UserError: it is missing or not a JSON object.
        """
        try:
            if self.index.is_local:
                file = self.index.folder / name / "config.json"
            else:
                file = hub_file(self.source, f"{name}/config.json", self.index.folder.name)
            config = load_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"the pipeline {self.source} does not load: {name}/config.json: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"the pipeline {self.source} does not load: {file} holds no JSON object")
        return config

    def pipeline(self, safety_checker: bool = False) -> Any:
        """The whole stock pipeline of diffusers, with the networks that `get` returns.

        Components that drawing does not need (`BESIDE`) are left out if their folder is missing, as in a pipeline that
        was copied without them.

        Args:
            safety_checker: keep the pipeline's safety checker, if it has one. It replaces images by black ones, which
                count as safe.

        Raises:
            UserError: a component is missing or does not load, or diffusers has no such pipeline.
        """
        import diffusers

        found = getattr(diffusers, self.index.class_name, None)
        if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
            raise UserError(self._told(f"diffusers has no pipeline of class {self.index.class_name}"))
        needed, optional = found._get_signature_keys(found)
        given: dict[str, Any] = {name: value for name, value in self.index.settings.items() if name in optional}
        self._check_complete(name for name in needed if name not in found._optional_components)
        for name in needed:
            given[name] = self.get(name) if self._draws_with(name, safety_checker) else None
        try:
            pipe: Any = found(**given)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(self._told(_first_line(error))) from error
        pipe.register_to_config(_name_or_path=str(self.index.folder))
        return pipe

    def _check_complete(self, needed: Iterable[str]) -> None:
        """Check that the index names all that drawing needs; diffusers would report it only during drawing, or never.

        Raises:
            UserError: it does not name all.
        """
        # SD3 can draw without any of its text encoders; their tokenizers may remain.
        alone = self.index.class_name.startswith("StableDiffusion3")
        encoders = [] if alone else [name for name in self.index.components if name.startswith("tokenizer")]
        for name in (*(one for one in needed if not alone or not one.startswith(("text_encoder", "tokenizer"))),
                     *(name.replace("tokenizer", "text_encoder") for name in encoders)):  # fmt: skip
            if not self.has(name) and name not in BESIDE:
                raise UserError(self._told(f"its model_index.json names no {name}"))

    def _draws_with(self, name: str, safety_checker: bool) -> bool:
        if not self.has(name):
            return False
        if name == "safety_checker" and not safety_checker:
            return False
        return name not in BESIDE or (self.index.folder / name).is_dir()

    def _load(self, name: str) -> Any:
        if name not in self.index.components:
            raise UserError(self._told(f"its model_index.json names no {name}"))
        found = self.class_of(name)
        try:
            return self._from_pretrained(found, name)
        except UserError as error:
            raise UserError(self._told(f"its {name}: {error}")) from error
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ImportError) as error:
            raise UserError(self._told(f"its {name} ({self.index.folder / name}): {_first_line(error)}")) from error
        except Exception as error:
            # The tokenizers library, which is not written in Python, has no special error for a damaged file.
            if type(error) is not Exception and not isinstance(error, SafetensorError | StrictDataclassError):
                raise
            raise UserError(self._told(f"its {name} ({self.index.folder / name}): {_first_line(error)}")) from error

    def class_of(self, name: str) -> type:
        """The class of a component, from the two libraries or from one of diffusers' pipelines.

        Raises:
            UserError: it is from neither.
        """
        library, class_name = self.index.components[name]
        home: Any = None
        if library in LIBRARIES:
            home = import_module(library)
        elif library.isidentifier():
            home = getattr(import_module("diffusers.pipelines"), library, None)
        if not isinstance(home, ModuleType):
            raise UserError(
                self._told(f"its {name} is of the library {library!r}; components come from {' and '.join(LIBRARIES)}")
            )
        found = getattr(home, class_name, None)
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            raise UserError(self._told(f"{library} has no {class_name} (its {name})"))
        return found

    def _from_pretrained(self, found: Any, name: str) -> Any:
        index = self.index
        folder = index.folder / name if index.is_local else hub_part(self.source, name, index.folder)
        if not folder.is_dir():
            raise UserError(f"model_index.json names it, but there is no folder {folder}")
        if issubclass(found, nn.Module):
            return load_network(found, folder, self.dtypes.get(name, self.dtype), self.quantizations.get(name))
        if "tokenizer" not in name:
            return self._config_only(found, folder)
        check_tokenizer_files(folder, found)
        tokenizer = found.from_pretrained(folder)
        check_tokenizer(getattr(tokenizer, "tokenizer", tokenizer), folder, self._encoder_of(name))
        return tokenizer

    def _config_only(self, found: Any, folder: Path) -> Any:
        """A scheduler or an image processor, which has no weights."""
        part = found.from_pretrained(folder)
        # With a scheduler of another process the model would get inputs that it never saw in training.
        stated = getattr(part, "config", {})
        if "sigma_data" in stated and "sigma_data" not in signature(found.__init__).parameters:
            raise UserError(
                f"{folder / 'scheduler_config.json'} is of the EDM process, and "
                f"model_index.json makes it a {found.__name__}: name the scheduler's own class there"
            )
        return part

    def _encoder_of(self, tokenizer: str) -> dict[str, Any] | None:
        """The configuration of the text encoder that reads a tokenizer's tokens; None: it does not exist."""
        name = tokenizer.replace("tokenizer", "text_encoder")
        if not self.has(name):
            return None
        if not self.index.is_local and hub_answers():
            return self.config(name)
        file = self.index.folder / name / "config.json"
        return read_config(file) if file.is_file() else None

    def _told(self, what: str) -> str:
        return f"the pipeline {self.source} does not load: {what}"


def load_network(found: Any, folder: Path, dtype: torch.dtype = torch.float32, quantization: str | None = None) -> Any:
    """Load a network of diffusers or transformers from its folder: complete, frozen and in evaluation mode.

    Args:
        found: its class.
        folder: folder of its config.json and weights.
        dtype: its dtype.
        quantization: the kind of `settings.Quantization` of its linear layers; None: ``dtype``.

    Raises:
        UserError: weights are missing, damaged, not finite, or do not fit its config.json; names the file. OSError,
            ValueError, RuntimeError: the library's errors about its configuration.
    """
    weights = need_weights(folder, _stem(found))
    if not (folder / "config.json").is_file():  # the libraries would use a default configuration
        raise UserError(f"{folder / 'config.json'} is missing: copy the folder again")
    more: dict[str, Any] = {}
    if quantization is not None:
        from lit_safety.backbones.lowered import configuration

        more["quantization_config"] = configuration(quantization, dtype)
    network, report = found.from_pretrained(
        folder, dtype=dtype, variant=weights.variant, use_safetensors=True, output_loading_info=True, **more
    )
    check_whole(network, report, folder)
    return network.requires_grad_(False).eval()


def _stem(found: type) -> str:
    """The name of the weights file for a class of networks."""
    from diffusers import ModelMixin

    return DIFFUSERS if issubclass(found, ModelMixin) else TRANSFORMERS


def _first_line(error: Exception) -> str:
    # For a contradictory configuration: the line with the reason comes after the line that names the check.
    told = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return (str(told).strip() or type(told).__name__).splitlines()[0]


class NoDenoiser(nn.Module):
    """Takes the denoiser's place in work that needs only the encoders; it follows `.to(device)`."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)
