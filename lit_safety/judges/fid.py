"""FID, and the features that it compares, from the judge's own network or from Inception."""

from __future__ import annotations

from contextlib import nullcontext
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lit_safety.core.errors import UserError
from lit_safety.core.images import rgb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL.Image import Image

    from lit_safety.judges.judge import Judge
    from lit_safety.judges.placing import Place


FeatureName = Literal["judge", "inception"]
BATCH = 64


class Penultimate(nn.Module):
    """The input of a classifier's last linear layer: the usual features for a distance between sets.

    Args:
        network: takes (B, 3, H, W) in [-1, 1].
        side: the only side in pixels that it accepts.
    """

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network = network
        self.side = side
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        self.num_features = last.in_features
        self._last = [last]  # in a list, because it is already registered inside `network`

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, d) of uint8 images (B, 3, side, side)."""
        caught: list[Tensor] = []
        hook = self._last[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            self.network(images.float() / 127.5 - 1.0)
        finally:
            hook.remove()
        return caught[0].flatten(1)


def feature_network(name: FeatureName, judge: Judge) -> tuple[nn.Module, dict[str, Any]]:
    """A network that turns uint8 images (B, 3, H, W) into features (B, d), and its entry in a report.

    Args:
        name: "judge": the penultimate layer of the judge that decides; "inception": Inception v3 of the original FID.
        judge: the judge that decides.

    Raises:
        UserError: the judge lacks such a layer, or packages for Inception are not installed.
    """
    if name == "judge":
        network = getattr(judge, "features", None)
        if not isinstance(network, nn.Module):
            raise UserError(
                f"--fid judge: the judge {judge.name} does not give features of images; use --fid inception"
            )
        about = {"features": judge.name, "features_sha256": judge.settings.get("sha256")}
        return network.eval(), {**about, "dimension": network.num_features}
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network = FrechetInceptionDistance(feature=2048).inception
    except ModuleNotFoundError as error:
        raise UserError("--fid inception: needs the extra `inception`: pip install 'lit-safety[inception]'") from error
    except OSError as error:
        raise UserError(f"--fid inception: the weights of Inception v3 cannot be downloaded ({error})") from error
    return network.eval(), {"features": "Inception v3 of torch-fidelity, pool3", "dimension": 2048}


def extract(network: nn.Module, images: Iterable[tuple[str, Image]], where: Place | None = None) -> Tensor:
    """Features (N, d), float64 on the CPU, of named images. Consecutive images of one size are computed together.

    Args:
        network: the network.
        pictures: name and image, one after another.
        where: in which number format it computes; None: its own. Its device is that of its weights.

    Raises:
        UserError: an image has a size that the network does not take, or its features are not finite.
    """
    rows = []
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    for names, batch in _batches(network, images):
        with torch.inference_mode(), nullcontext() if where is None else where.computing():
            found = network(batch.to(device)).flatten(1).double().cpu()
        if not found.isfinite().all():
            bad = names[int((~found.isfinite().all(1)).nonzero()[0])]
            raise UserError(f"{bad}: its features are not finite, so FID cannot be computed")
        rows.append(found)
    return torch.cat(rows) if rows else torch.zeros(0, int(getattr(network, "num_features", 0)), dtype=torch.float64)


def _batches(network: nn.Module, images: Iterable[tuple[str, Image]]) -> Iterator[tuple[list[str], Tensor]]:
    side = getattr(network, "side", None)
    names: list[str] = []
    held: list[Image] = []
    for name, given in images:
        image = rgb(given, name)
        if side is not None and image.size != (side, side):
            width, height = image.size
            raise UserError(f"{name}: is {width} x {height} pixels, but the judge's features need {side} x {side}")
        if held and (image.size != held[0].size or len(held) == BATCH):
            yield names, _stack(held)
            names, held = [], []
        names.append(name)
        held.append(image)
    if held:
        yield names, _stack(held)


def _stack(images: list[Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, dtype=np.uint8) for p in images])).permute(0, 3, 1, 2)


# Frechet inception distance between two sets of features, with an interval.
#
# The value is torchmetrics'. It is biased upwards in small sets, so it is compared only at equal n, and n and the
# feature dimension are reported with it. The interval is a jackknife over `GROUPS` groups of prompts: leaving out a
# group changes the bias of all terms equally, so it cancels. A bootstrap, whose samples hold 63% of the images, would
# add bias.


GROUPS = 20
T19 = 2.093024054408263
"""97.5% point of Student's t with GROUPS - 1 degrees of freedom."""
LARGEST = 1024
"""If both the images and the dimension exceed this, the jackknife is left out, because it would take many minutes."""


def fid(features: Tensor, reference: Tensor) -> float:
    """|mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of features (n, d) and (m, d), by torchmetrics in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = nn.Identity()
    network.num_features = features.shape[1]  # type: ignore[assignment]  # torchmetrics asks for it
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return max(0.0, float(metric.compute()))


def left_out(features: Tensor, reference: Tensor, paired: bool) -> Tensor | None:
    """The distance without each group of rows in turn, (GROUPS,); None if there are too few or too many rows.

    Args:
        features: (n, d); row i belongs to group i mod GROUPS.
        reference: (m, d).
        paired: whether row i of both answers the same prompt and seed; then it is left out of both.
    """
    n, d = features.shape
    if n < 2 * GROUPS or (min(n, d) > LARGEST):
        return None
    group = torch.arange(n) % GROUPS
    fixed = None if paired else _moments(reference)
    found = []
    for g in range(GROUPS):
        keep = group != g
        found.append(_frechet(_moments(features[keep]), fixed or _moments(reference[keep])))
    return torch.tensor(found, dtype=torch.float64)


def jackknife(value: float, parts: Tensor | None) -> list[float] | None:
    """95% interval of a value: value -+ t_19 sqrt((G - 1) / G sum_g (v_g - mean v)^2); None without parts."""
    if parts is None:
        return None
    half = T19 * sqrt((GROUPS - 1) / GROUPS * float((parts - parts.mean()).square().sum()))
    return [value - half, value + half]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and R (min(n, d), d) with R^T R the covariance."""
    mean = features.mean(0)
    centred = (features - mean) / sqrt(len(features) - 1)
    return mean, centred if len(features) <= features.shape[1] else torch.linalg.qr(centred, mode="r").R


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """The same distance: Tr (S_1 S_2)^(1/2) is the sum of the singular values of R_1 R_2^T."""
    (m1, r1), (m2, r2) = first, second
    overlap = torch.linalg.svdvals(r1 @ r2.T).sum()
    return float((m1 - m2).square().sum() + r1.square().sum() + r2.square().sum() - 2 * overlap)
