"""A batch of preference pairs: what the datamodule yields and the modules read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_safety.core.chance import LATENT, NOISE, normal
from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import PairMetadata, Sides

if TYPE_CHECKING:
    from lit_safety.data.cache.reference import FixedDraw
    from lit_safety.data.reading.groups import Groups


def to_floats(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1], the same bits on every device; tensors of other types as they are."""
    if images.dtype is not torch.uint8:
        return images
    # GPUs divide by a number of the host as a product with its inverse, which rounds in another way.
    half = torch.full((), 127.5, device=images.device)
    return images.float().div_(half).sub_(1.0)


@dataclass
class PairBatch:
    """B preference pairs.

    Images leave the loader as the 8 bits that were decoded, a quarter of what their numbers take on the way from a
    worker to the device. `to` makes the numbers there; Lightning calls it for every batch, also on a CPU.
    """

    keys: list[str]
    """Each sample's key."""
    seeds: list[int]
    """Each sample's 63-bit seed, a pure function of (seed, epoch, key): see `lit_safety.core.chance`."""
    prompts: list[str]
    """The prompts that both images of a pair were made for."""
    prompt_kinds: list[str]
    """`harmful` or `clean`."""
    categories: list[tuple[str, ...]]
    """Canonical harm categories."""
    orders: list[str]
    """What decided which image is chosen: `safety`, `quality` or `composite`."""
    chosen: Tensor | None
    """float32 (B, 3, H, W) in [-1, 1], or uint8 before `to`; None if there are `latents` instead."""
    rejected: Tensor | None
    """As `chosen`."""
    clean: Tensor
    """float32 (B,): 1 for a clean prompt, 0 for a harmful one (`prompt_kinds` as numbers)."""
    harmful: Tensor
    """float32 (B, 2): 1 harmful, 0 safe, nan unknown; column 0 chosen, column 1 rejected. Labels, not
    scores."""
    cost: Tensor
    """float32 (B, 2): a cost model's values, above 0 harmful, nan unknown; columns as in `harmful`."""
    has_cost: list[bool]
    """Whether both costs of a pair are known. On the host, so that reading it does not wait for the device."""
    score: Tensor
    """float32 (B, 2): quality, higher is better, nan unknown; columns as in `harmful`."""
    has_score: list[bool]
    """Whether both scores of a pair are known; on the host, as `has_cost`."""
    has_harmful: list[bool]
    """Whether both labels of a pair are known; on the host, as `has_cost`."""
    user_ids: list[str | None]
    """The user whose preference it is; None: it holds for all users."""
    category: str | None = None
    """The category of all pairs, if batches are made by category (`one_category`)."""
    latents: Tensor | None = None
    """float32 (B, 2, 2, C, h, w) from a cache: chosen and rejected, mean and standard deviation, unscaled."""
    conditioning: dict[str, Tensor] | None = None
    """The text encoders' outputs for `prompts` from a cache, float32, B rows each."""
    empty: dict[str, Tensor] | None = None
    """The same for the empty prompt, 1 row each."""
    crops: Tensor | None = None
    """float32 (B, 2, 6), chosen and rejected, in pixels: height and width of the stored image, top and left of the crop
    in the scaled image, height and width of the crop."""
    fixed_seeds: list[int] | None = None
    """From a reference cache: each pair's seed of timestep, noise and latent sample, used instead of `seeds`."""
    fixed_timesteps: list[float] | None = None
    """The timesteps that those seeds gave when the cache was made, in the backbone's own unit."""
    reference: Tensor | None = None
    """float32 (B, 2, 1 or 2): the reference's errors there, for chosen and rejected, with the prompt and without."""
    reference_prediction: Tensor | None = None
    """float32 (B, 1 or 2, C, h, w): its predictions on the chosen image, with the prompt and without; zeros for harmful
    prompts."""
    origins: list[tuple[int, int] | None] = field(default_factory=list)
    """Seeds of the noise that both images were drawn from; None: not known, or the images were cut since."""
    draws: dict[str, Tensor] = field(default_factory=dict)
    """Standard normal numbers by purpose, (B, C, h, w), drawn earlier by a worker: `chance.normal(seeds, purpose,
    ...)`. Those of other purposes are drawn when they are needed."""
    skipped: list[str] = field(default_factory=list)
    """Bad samples that were left out while this batch was made (`on_bad_sample: skip`): name and reason
    each."""
    mask: Tensor | None = None
    """float32 (B, H, W) in [0, 1]: where chosen and rejected differ, 1 everywhere for pairs without a mask; None: masks
    are not read, or no pair has one."""
    groups: Groups | None = None
    """Where groups are read whole: all images, in the place of `chosen`, `rejected`, `latents`, `crops` and `reference`
    here. `harmful`, `cost` and `score` are of the best and the worst, and `has_...` say whether all are known."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def noise_seeds(self) -> list[int]:
        """Each pair's seed of timestep, noise and latent sample."""
        return self.seeds if self.fixed_seeds is None else self.fixed_seeds

    def take(self, rows: Sequence[int]) -> PairBatch:
        """The batch of the pairs at `rows` only."""
        taken = copy.copy(self)
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.name in ("empty", "skipped"):
                continue
            if one.name == "groups":
                taken.groups = None if value is None else value.take(rows)
            elif isinstance(value, list):
                setattr(taken, one.name, [value[row] for row in rows] if value else [])
            elif isinstance(value, Tensor):
                setattr(taken, one.name, value[list(rows)])
            elif isinstance(value, dict):
                setattr(taken, one.name, {name: tensor[list(rows)] for name, tensor in value.items()})
        return taken

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> PairBatch:
        """The batch with its tensors on `device`, images as float32 in [-1, 1].

        Args:
            device: the target.
            non_blocking: do not wait for the copies; None: if that is safe. Lightning asks for it only with tensors, so
                each copy of a batch would otherwise empty the device's queue.
        """
        wait = torch.device(device).type in ("cpu", "mps") if non_blocking is None else not non_blocking
        return self._map(lambda tensor: to_floats(tensor.to(device, non_blocking=not wait)))

    def pin_memory(self) -> PairBatch:
        """The batch with its tensors in page-locked memory, for faster copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        moved = copy.copy(self)
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                setattr(moved, one.name, function(value))
            elif isinstance(value, dict):
                setattr(moved, one.name, {name: function(tensor) for name, tensor in value.items()})
        moved.groups = None if self.groups is None else self.groups.map(function)
        return moved


@dataclass
class Pair:
    """One decoded sample."""

    key: str
    seed: int
    metadata: PairMetadata
    chosen: Tensor | None
    """uint8 (3, H, W); None if there are latents instead."""
    rejected: Tensor | None
    where: str
    """Shard and key, for messages."""
    crops: Tensor | None = None
    """float32 (2, 6), as `PairBatch.crops`."""
    latents: Tensor | None = None
    """float32 (2, 2, C, h, w), as `PairBatch.latents`."""
    conditioning: dict[str, Tensor] | None = None
    """The text encoders' outputs for the prompt, without the batch dimension."""
    draw: FixedDraw | None = None
    """From a reference cache: timestep, noise and the reference's errors there."""
    images: Tensor | None = None
    """uint8 (n, 3, H, W): all images of a sample that is read whole, in the place of `chosen` and `rejected`."""
    mask: Tensor | None = None
    """float32 (H, W), as `PairBatch.mask`."""
    whole: bool = False
    """Read whole: `crops`, `latents` and what is drawn have n rows, one an image."""


def collate(
    pairs: Sequence[Pair],
    category: str | None = None,
    skipped: Sequence[str] = (),
    empty: dict[str, Tensor] | None = None,
) -> PairBatch:
    """Make a batch of pairs.

    Args:
        pairs: all with images, or all with latents and text.
        category: the category that they share, if they were chosen by category.
        skipped: bad samples that were left out.
        empty: the text encoders' outputs for the empty prompt, if the pairs hold outputs for their prompts.

    Raises:
        UserError: images have different sizes; names one sample of each size and the YAML key to set.
    """
    _check_sizes(pairs)
    seeds = [pair.seed for pair in pairs]
    fixed = [pair.draw for pair in pairs if pair.draw is not None]
    if len(fixed) < len(pairs):
        fixed = []
    noise_seeds = [one.seed for one in fixed] or seeds
    groups = None
    if pairs[0].whole:
        from lit_safety.data.reading.groups import groups_of

        groups = groups_of(pairs)
    latents = _stack([None if groups else pair.latents for pair in pairs])
    # A step needs thousands of these numbers. They are drawn here, in the worker, where their count is known.
    cached = groups.latents if groups else latents
    draws = {} if cached is None else {name: normal(noise_seeds, name, cached.shape[3:]) for name in (NOISE, LATENT)}
    nan = float("nan")
    unknown: Sides[float] = Sides(nan, nan)
    labels = [pair.metadata.harmful for pair in pairs]
    costs = [pair.metadata.cost or unknown for pair in pairs]
    scores = [pair.metadata.score or unknown for pair in pairs]
    return PairBatch(
        keys=[pair.key for pair in pairs],
        seeds=seeds,
        prompts=[pair.metadata.prompt for pair in pairs],
        prompt_kinds=[pair.metadata.prompt_kind for pair in pairs],
        categories=[pair.metadata.categories for pair in pairs],
        orders=[pair.metadata.order for pair in pairs],
        chosen=_stack([pair.chosen for pair in pairs]),
        rejected=_stack([pair.rejected for pair in pairs]),
        clean=torch.tensor([float(pair.metadata.prompt_kind == "clean") for pair in pairs]),
        harmful=torch.tensor(
            [[nan if side is None else float(side) for side in (one.chosen, one.rejected)] for one in labels]
        ),
        cost=torch.tensor([[one.chosen, one.rejected] for one in costs]),
        has_cost=[pair.metadata.knows("cost", pair.whole) for pair in pairs],
        score=torch.tensor([[one.chosen, one.rejected] for one in scores]),
        has_score=[pair.metadata.knows("score", pair.whole) for pair in pairs],
        has_harmful=[pair.metadata.knows("harmful", pair.whole) for pair in pairs],
        user_ids=[pair.metadata.user_id for pair in pairs],
        category=category,
        latents=latents,
        conditioning=_rows(pairs),
        empty=empty,
        crops=_stack([None if groups else pair.crops for pair in pairs]),
        fixed_seeds=noise_seeds if fixed else None,
        fixed_timesteps=[one.timestep for one in fixed] or None,
        reference=_stack([one.errors for one in fixed]) if fixed and not groups else None,
        reference_prediction=_stack([one.prediction for one in fixed]) if fixed else None,
        origins=[_origin(pair) for pair in pairs],
        draws=draws,
        skipped=list(skipped),
        mask=_masks(pairs),
        groups=groups,
    )


def _origin(pair: Pair) -> tuple[int, int] | None:
    """Seeds of both images' noise, where it has kept its place: nothing was cut or scaled."""
    seeds = pair.metadata.noise_seeds
    whole = pair.crops is None or bool((pair.crops[:, :2] == pair.crops[:, 4:]).all())
    return None if seeds is None or not whole else (seeds.chosen, seeds.rejected)


def _stack(found: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [one for one in found if one is not None]
    return torch.stack(tensors) if len(tensors) == len(found) else None


def _masks(pairs: Sequence[Pair]) -> Tensor | None:
    like = next((pair.mask for pair in pairs if pair.mask is not None), None)
    if like is None:
        return None
    return torch.stack([torch.ones_like(like) if pair.mask is None else pair.mask for pair in pairs])


def _rows(pairs: Sequence[Pair]) -> dict[str, Tensor] | None:
    found = [pair.conditioning for pair in pairs if pair.conditioning is not None]
    if len(found) != len(pairs):
        return None
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def _check_sizes(pairs: Sequence[Pair]) -> None:
    first = pairs[0]
    for pair in pairs:
        for side, image in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if image is not None and first.chosen is not None and image.shape != first.chosen.shape:
                raise UserError(
                    f"{pair.where}: {side} is {_size(image)} but {first.where} "
                    f"has {_size(first.chosen)}; images of one batch must be of one size: set "
                    "data.init_args.resolution"
                )


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"
