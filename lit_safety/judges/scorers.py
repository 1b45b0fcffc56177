"""Preference scorers: networks trained on people's preferences, to check how alignment changes quality.

They measure preference, not safety, and our trainings never use them. A scorer is a small YAML file (configs/scorers/*)
with class_path and init_args.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lit_safety.core.errors import UserError
from lit_safety.core.images import rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from lit_safety.judges.placing import JudgePrecision, Place


class PreferenceScorer(Protocol):
    """Scores images with their prompts; higher is better. `settings` holds everything that changes its scores."""

    name: str
    settings: dict[str, Any]

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One number an image, in the same order."""
        ...


class ClipPreference:
    """A CLIP fine-tuned on people's choices: scale x cosine of image and prompt.

    PickScore (arXiv 2305.01569, its scale is the CLIP's own) and HPS v2 (arXiv 2306.09341, scale 1) are such CLIPs.

    Args:
        clip: folder or hub id of the fine-tuned CLIP in transformers' layout.
        name: its name in the report.
        scale: the factor of cosines; null: the CLIP's own exp(logit_scale).
        processor: folder or hub id of its tokenizer and preprocessor; null: those next to the weights.
        device: where it runs; null: where the command draws.

    Raises:
        UserError: it does not load.
    """

    def __init__(
        self,
        clip: str,
        name: str = "PickScore",
        scale: float | None = None,
        processor: str | None = None,
        device: str | None = None,
    ) -> None:
        from lit_safety.judges.clip import Clip

        self.clip = Clip(clip, f"{name}: clip", device, processor)
        self.scale = float(self.clip.model.logit_scale.exp()) if scale is None else scale
        self.name = name
        self.settings: dict[str, Any] = {"name": name, "rule": "scale x cosine", "scale": self.scale}
        self.settings |= self.clip.settings

    def place(self, where: Place) -> JudgePrecision:
        """Compute there, unless the device was given."""
        return self.clip.place(where)

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """scale cos of each image and its prompt."""
        cosines = (self.clip.images(images).double() * self.clip.texts(prompts).double()).sum(1)
        return (self.scale * cosines).tolist()


class AestheticScore:
    """LAION's improved aesthetic predictor: five linear layers on CLIP's unit vector of an image, about 1 to 10.

    Args:
        clip: the CLIP it was trained on, ViT-L/14: folder or hub id.
        weights: its weights, sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor, read
            without unpickling anything but tensors; or the same as .safetensors.
        device: where CLIP runs; null: where the command draws.

    Raises:
        UserError: a file is missing or damaged, or belongs to another CLIP.
    """

    def __init__(self, clip: str, weights: str, device: str | None = None) -> None:
        import torch

        from lit_safety.core.hashes import content_sha256
        from lit_safety.judges.clip import Clip

        tensors = _read_tensors(weights)
        self.clip = Clip(clip, "aesthetic score: clip", device)
        numbers = sorted(int(key.split(".")[1]) for key in tensors if key.startswith("layers.") and "weight" in key)
        layers = []
        for number in numbers:
            weight, bias = tensors.get(f"layers.{number}.weight"), tensors.get(f"layers.{number}.bias")
            if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
                raise UserError(f"aesthetic score: weights {weights}: layer {number} is not a linear layer")
            layers.append((weight.float(), bias.float()))
        sides = [self.clip.settings["dimension"], *(len(bias) for _, bias in layers)]
        fitting = [weight.shape[1] == side for (weight, _), side in zip(layers, sides, strict=False)]
        if not layers or sides[-1] != 1 or not all(fitting):
            raise UserError(
                f"aesthetic score: weights {weights}: are not linear layers from {sides[0]} numbers (those of {clip}) "
                "to one; take the weights that belong to this CLIP"
            )
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = layers
        self.name = "aesthetic score"
        self.settings: dict[str, Any] = {
            "name": self.name, "rule": "linear layers on the image's unit vector",
            "weights_sha256": content_sha256(weights), **self.clip.settings,
        }  # fmt: skip

    def place(self, where: Place) -> JudgePrecision:
        """CLIP computes there, unless the device was given; the five layers stay on the CPU in float32."""
        return self.clip.place(where)

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """The predicted rating; prompts are not used."""
        values = self.clip.images(images)
        for weight, bias in self.layers:
            values = values @ weight.T + bias
        return values[:, 0].tolist()


class ImageRewardScore:
    """ImageReward (arXiv 2304.05977) by its own package, `image-reward`, which must be installed separately.

    Args:
        model: its name or the path of its weights.
        device: where it runs; null: the CPU.
        scorer: anything with the package's `score(prompt, image) -> float`; null: the package's.

    Raises:
        UserError: the package is not installed, or its weights do not load.
    """

    def __init__(self, model: str = "ImageReward-v1.0", device: str | None = None, scorer: Any = None) -> None:
        self.scorer = scorer if scorer is not None else _image_reward(model, device)
        self.name = "ImageReward"
        self.settings: dict[str, Any] = {"name": self.name, "model": model}
        if Path(model).exists():
            from lit_safety.core.hashes import content_sha256

            self.settings["sha256"] = content_sha256(model)

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """The reward of each image for its prompt."""
        return [float(self.scorer.score(text, rgb(image))) for text, image in zip(prompts, images, strict=True)]


def load_scorer(spec: str) -> PreferenceScorer:
    """The scorer that a file describes, such as configs/scorers/pickscore.yaml.

    Raises:
        UserError: the file is unreadable, does not describe a scorer, or its weights are missing.
    """
    from lit_safety.core.shipped import shipped
    from lit_safety.judges.load import object_from_file

    if not Path(spec := shipped(spec)).is_file():
        raise UserError(f"--preference {spec}: no such file; give one such as configs/scorers/pickscore.yaml")
    return object_from_file(Path(spec), PreferenceScorer, "--preference", "configs/scorers/*")


def _read_tensors(file: str) -> dict[str, Any]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise UserError(f"aesthetic score: weights {file}: no such file")
    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"aesthetic score: weights {file}: cannot be read as tensors ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"aesthetic score: weights {file}: do not hold tensors by name")
    return found


def _image_reward(model: str, device: str | None) -> Any:
    try:
        import ImageReward  # type: ignore[import-not-found,unused-ignore]  # not among our dependencies
    except ImportError as error:
        raise UserError("ImageReward: its package is not installed: pip install image-reward") from error
    try:
        return ImageReward.load(model, device=device or "cpu")
    except Exception as error:  # the hub's and torch's own kinds
        raise UserError(f"ImageReward: {model} does not load ({error})") from error
