"""The frozen CLIP vision tower under the cost model: any transformers CLIP checkpoint, a folder or a hub id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from lit_safety.core.clip_preprocess import FILE_NAME, ClipPreprocess
from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json, read_text
from lit_safety.core.weights import TRANSFORMERS, check_whole, need_weights

#: `embedding`: the projected image embedding, which CLIP itself compares with text. `pooled`: the class token before
#: the projection. `patches`: the same and the mean over the patch tokens, which shows small things better.
Features = Literal["embedding", "pooled", "patches"]


class ClipTower:
    """Images -> features. Not an `nn.Module`, so that checkpoints and sharding strategies never include its weights.

    Args:
        source: a folder that `save_pretrained` wrote, or a hub id.
        features: which of the tower's outputs to use.

    Raises:
        UserError: there is no CLIP, or it lacks the output that `features` names.
    """

    def __init__(self, source: str, features: Features = "embedding") -> None:
        self.source = source
        self.features: Features = features
        self.network = _load(source, projected=features == "embedding")
        self.preprocess = ClipPreprocess.read(_file(source, FILE_NAME))
        self.half: torch.dtype | None = None
        """The number format in which it computes, by autocast; None: float32, in which cost models are trained."""
        self._sha256: str | None = None

    @property
    def width(self) -> int:
        """How many numbers a feature has."""
        hidden = int(self.network.config.hidden_size)
        widths = {"embedding": int(self.network.config.projection_dim), "pooled": hidden, "patches": 2 * hidden}
        return widths[self.features]

    @property
    def device(self) -> torch.device:
        return self.network.device

    def to(self, device: torch.device | str) -> Self:
        self.network.to(device)
        return self

    @property
    def sha256(self) -> str:
        """sha256 of weights and preprocessing: equal for a copy of the checkpoint with any path or name."""
        if self._sha256 is None:
            total = hashlib.sha256(repr(self.preprocess).encode())
            for name, value in sorted(self.network.vision_model.state_dict().items()):
                total.update(f"{name}{tuple(value.shape)}".encode())
                total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
            total.update(self.network.visual_projection.weight.detach().float().cpu().numpy().tobytes())
            self._sha256 = total.hexdigest()
        return self._sha256

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], on any device -> float32 features (B, width) on the tower's device."""
        pixels = self.preprocess(images.to(self.device))
        # Without a training's autocast: otherwise the features would differ from those of the exported model.
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            found = self.network.vision_model(pixel_values=pixels)
            if self.features == "embedding":
                return self.network.visual_projection(found.pooler_output).float()
            if self.features == "pooled":
                return found.pooler_output.float()
            patches = self.network.vision_model.post_layernorm(found.last_hidden_state[:, 1:]).mean(1)
            return torch.cat([found.pooler_output, patches], 1).float()


def _load(source: str, projected: bool) -> Any:
    from transformers import CLIPVisionModelWithProjection

    class VisionTower(CLIPVisionModelWithProjection):
        """The text tower of a whole CLIP is left out on purpose, so transformers must not report it."""

        _keys_to_ignore_on_load_unexpected = [r"text_model\..*", r"text_projection\..*", "logit_scale"]  # noqa: RUF012

    config = _file(source, "config.json")
    try:
        kind = load_json(read_text(config)).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config}: is not a model's config ({error})") from error
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{source}: is a model of type {kind!r}; a cost model needs a CLIP checkpoint")
    try:
        variant = need_weights(Path(source), TRANSFORMERS).variant if Path(source).is_dir() else None
        loaded: Any = VisionTower.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except (UserError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"the CLIP {source} does not load: {reason}") from error
    network, report = loaded
    missing = sorted(report["missing_keys"])
    if missing == ["visual_projection.weight"] and not projected:
        torch.nn.init.zeros_(network.visual_projection.weight)  # else it would be random, and it is part of the sha256
    elif missing:
        raise UserError(f"the CLIP {source} lacks weights for {missing[0]}; use the whole CLIP, or other features")
    check_whole(network, {**report, "missing_keys": []}, source)
    return network.requires_grad_(False).eval()


def _file(source: str, name: str) -> Path:
    """A file of the checkpoint, fetched from the hub if ``source`` is not a folder."""
    if Path(source).is_dir():
        if not (Path(source) / name).is_file():
            raise UserError(f"{source}: lacks {name}; give a folder that CLIPModel.save_pretrained wrote, or a hub id")
        return Path(source) / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except HFValidationError as error:
        raise UserError(f"{source!r} is neither a folder nor a hub id: check the path of the CLIP") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source!r} is not a folder, and the hub did not give its {name} ({type(error).__name__}): check the "
            "path; without a network, give a local folder"
        ) from error


# The part of the cost model that is trained: a residual adapter on CLIP features and a linear head.


class CostAdapter(nn.Module):
    """C(x) = head(f + mlp(f)), f the layer-normalised CLIP features: a CLIP adapter (Gao et al., arXiv 2110.04544).

    The MLP's last layer starts at zero, so that the adapter starts as a linear probe.

    Args:
        features: numbers in a CLIP feature.
        width: hidden units of the MLP.
        dropout: share of hidden units left out in training, in [0, 1).
    """

    def __init__(self, features: int, width: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        last, self.head = nn.Linear(width, features), nn.Linear(features, 1)
        for layer in (last, self.head):
            nn.init.zeros_(layer.bias)
            nn.init.zeros_(layer.weight)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Dropout(dropout), last)

    def adapted(self, features: Tensor) -> Tensor:
        """CLIP features (N, D) -> adapted features (N, D)."""
        normed = self.norm(features)
        return normed + self.mlp(normed)

    def cost(self, adapted: Tensor) -> Tensor:
        """Adapted features (N, D) -> costs (N,), not calibrated."""
        return self.head(adapted).squeeze(1)

    def forward(self, features: Tensor) -> Tensor:
        """CLIP features (N, D) -> costs (N,), not calibrated; above 0 is harmful."""
        return self.cost(self.adapted(features))


# A finished cost model: images in, calibrated costs out.


class CostScorer:
    """C(x) = (adapter(CLIP(x)) + bias) / temperature: above 0 is harmful, sigmoid(C) is the probability of harm.

    `load_cost_model` makes it from a folder.

    Args:
        tower: the frozen CLIP vision tower.
        adapter: trained on this tower's features.
        temperature: of the calibration, above 0.
        bias: of the calibration, added before the division.
    """

    def __init__(self, tower: ClipTower, adapter: CostAdapter, temperature: float = 1.0, bias: float = 0.0) -> None:
        self.tower = tower
        self.adapter = adapter.requires_grad_(False).eval()
        self.temperature = temperature
        self.bias = bias

    def to(self, device: torch.device | str) -> Self:
        """Move both networks."""
        self.tower.to(device)
        self.adapter.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.tower.device

    @torch.no_grad()
    def costs(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Costs, float32 (B,) on the scorer's device; nan or infinite only if the weights or an image are.

        Args:
            images: PIL images of any sizes, or a tensor (B, 3, H, W) in [-1, 1].
        """
        if isinstance(images, Tensor):
            features = self.tower(images)
        elif not images:
            return torch.empty(0, device=self.device)
        else:
            features = self.features(images)
        return (self.adapter(features) + self.bias) / self.temperature

    def features(self, images: Sequence[Image]) -> Tensor:
        """The tower's features (B, D) of images in the given order; images of one size are computed together."""
        from lit_safety.core.images import rgb
        from lit_safety.data.reading.decode import to_tensor

        images = [rgb(image) for image in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            by_size.setdefault(image.size, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in by_size.values():
            rows = self.tower(torch.stack([to_tensor(images[i]) for i in numbers]))
            found |= dict(zip(numbers, rows, strict=True))
        return torch.stack([found[i] for i in range(len(images))])
