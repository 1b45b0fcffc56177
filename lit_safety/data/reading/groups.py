"""All images of a batch's prompts, for groups that are read whole, instead of only the best and the worst."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.data.cache.reference import FixedDraw
    from lit_safety.data.format.sample import PairMetadata


class Whole(Protocol):
    """What is needed from a sample that was read whole; `Pair` provides it."""

    metadata: PairMetadata
    where: str
    images: Tensor | None
    latents: Tensor | None
    crops: Tensor | None
    draw: FixedDraw | None


@dataclass
class Groups:
    """The images of B prompts, at most K each. Entries (b, k) without an image are zeros, in `ranks` -1.

    A pair is a group of two.
    """

    sizes: list[int]
    """How many images each prompt has; on the host."""
    ranks: Tensor
    """int64 (B, K): 0 is the best, equal numbers are ties (`PairMetadata.ranks`), -1 means no image."""
    sides: Tensor
    """int64 (B, 2): the indices of the best and the worst, which `PairBatch` calls chosen and rejected."""
    harmful: Tensor
    """float32 (B, K): 1 harmful, 0 safe, nan unknown."""
    cost: Tensor
    """float32 (B, K): above 0 harmful, nan unknown."""
    score: Tensor
    """float32 (B, K): quality, higher is better, nan unknown."""
    images: Tensor | None = None
    """float32 (B, K, 3, H, W) in [-1, 1]; uint8 before `PairBatch.to`, which makes what is no image -1."""
    latents: Tensor | None = None
    """float32 (B, K, 2, C, h, w) from a cache: mean and standard deviation, unscaled."""
    crops: Tensor | None = None
    """float32 (B, K, 6), as `PairBatch.crops`."""
    reference: Tensor | None = None
    """float32 (B, K, 1 or 2) from a reference cache: the reference's errors, with the prompt and without."""

    @property
    def owners(self) -> list[int]:
        """For each image in `flat`, the row of its prompt."""
        return [row for row, size in enumerate(self.sizes) for _ in range(size)]

    def _places(self, device: torch.device) -> Tensor:
        width = self.ranks.shape[1]
        places = [row * width + place for row, size in enumerate(self.sizes) for place in range(size)]
        return torch.tensor(places).to(device, non_blocking=True)

    def flat(self, values: Tensor) -> Tensor:
        """(B, K, ...) -> (N, ...): the values of existing images, sorted by prompt."""
        return values.flatten(0, 1)[self._places(values.device)]

    def padded(self, values: Tensor) -> Tensor:
        """(N,) -> (B, K), with zeros for missing images."""
        empty = values.new_zeros(self.ranks.numel())
        return empty.index_copy(0, self._places(values.device), values).view(self.ranks.shape)

    def take(self, rows: Sequence[int]) -> Groups:
        """Only the groups of the prompts at `rows`."""
        taken = self.map(lambda tensor: tensor[list(rows)])
        taken.sizes = [self.sizes[row] for row in rows]
        return taken

    def map(self, function: Callable[[Tensor], Tensor]) -> Groups:
        """A copy in which ``function`` was applied to every tensor."""
        made = copy.copy(self)
        for one in dataclasses.fields(self):
            if isinstance(value := getattr(self, one.name), Tensor):
                setattr(made, one.name, function(value))
        return made


def groups_of(pairs: Sequence[Whole]) -> Groups:
    """Combine samples that were read whole.

    Raises:
        UserError: images have different sizes.
    """
    sizes = [len(pair.metadata.names) for pair in pairs]
    width = max(sizes)
    nan = float("nan")
    columns = [_columns(pair.metadata) for pair in pairs]

    def known(number: int) -> Tensor:
        rows = [[nan if one is None else float(one) for one in column[number]] for column in columns]
        return torch.tensor([row + [nan] * (width - len(row)) for row in rows])

    first = pairs[0]
    for pair in pairs:
        if pair.images is not None and first.images is not None and pair.images.shape[1:] != first.images.shape[1:]:
            raise UserError(
                f"{pair.where}: its images have another size than those of {first.where}; images of one batch must "
                "have the same size: set data.init_args.resolution"
            )
    ranks = [pair.metadata.ranks or () for pair in pairs]
    drawn = [pair.draw.errors for pair in pairs if pair.draw is not None]
    return Groups(
        sizes=sizes,
        ranks=torch.tensor([[*row, *[-1] * (width - len(row))] for row in ranks]),
        sides=torch.tensor([pair.metadata.sides for pair in pairs]),
        harmful=known(0),
        cost=known(1),
        score=known(2),
        images=_stacked([pair.images for pair in pairs], width),
        latents=_stacked([pair.latents for pair in pairs], width),
        crops=_stacked([pair.crops for pair in pairs], width),
        reference=_stacked(drawn, width) if len(drawn) == len(pairs) else None,
    )


def _columns(about: PairMetadata) -> list[list[float | bool | None]]:
    """Labels, costs and scores of each image."""
    if about.images:
        return [[getattr(one, name) for one in about.images] for name in ("harmful", "cost", "score")]
    sides = (about.harmful, about.cost, about.score)
    return [[None, None] if one is None else [one.chosen, one.rejected] for one in sides]


def _stacked(found: Sequence[Tensor | None], width: int) -> Tensor | None:
    tensors = [one for one in found if one is not None]
    if len(tensors) < len(found):
        return None
    return torch.stack([torch.cat([one, one.new_zeros(width - len(one), *one.shape[1:])]) for one in tensors])
