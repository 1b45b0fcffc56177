"""The LightningDataModule of a module that draws its own training images: which image of a round is in which batch.

A round is so many prompts with so many images each, gone through in a few passes; then the next round is drawn. The
datamodule knows places alone, the image number k of the prompt number g of a round, so that it depends on no weights:
what stands in a place, the module knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_safety.core.chance import sample_seed
from lit_safety.core.errors import UserError
from lit_safety.data.format.ranking import MAX_IMAGES
from lit_safety.data.reading.batch import PairBatch
from lit_safety.data.reading.order import Deal, permutation
from lit_safety.data.reading.position import DataPosition

KEY = "data.init_args"


def place_key(number: int, prompt: int, image: int) -> str:
    """The key of an image: round, prompt of the round and image of the prompt, each from 0."""
    return f"{number:05d}-{prompt:05d}-{image:02d}"


def places_of(key: str) -> tuple[int, int, int]:
    """Round, prompt and image of `place_key`."""
    number, prompt, image = key.split("-")
    return int(number), int(prompt), int(image)


class RoundData(LightningDataModule):
    """Deals the images of a round to steps and ranks, in another order in every pass; for `OnlineSCDPO`.

    The images of a prompt stay together, and share timestep and noise: what they have in common then cancels. The
    order and every random choice for an image depend only on `seed` and the pass, not on the number of ranks; a
    resumed run continues exactly. `trainer.max_epochs` counts passes: rounds times `passes`.

    Args:
        prompts_per_round: Prompts that a round draws.
        images_per_prompt: Images of each of them, at least 2: an image is as good as the others of its prompt say.
        passes: How often a round's images are gone through before the next round is drawn.
        batch_size: Prompts in a batch on each rank, with all their images.
        seed: Fixes prompts, their seeds, the images' order and every random choice for an image.
    """

    def __init__(
        self,
        prompts_per_round: int = 64,
        images_per_prompt: int = 4,
        passes: int = 2,
        batch_size: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, given, least in (
            ("prompts_per_round", prompts_per_round, 1),
            ("images_per_prompt", images_per_prompt, 2),
            ("passes", passes, 1),
            ("batch_size", batch_size, 1),
        ):
            if given < least:
                raise UserError(f"{KEY}.{name} must be at least {least}, not {given}")
        if images_per_prompt > MAX_IMAGES:
            raise UserError(f"{KEY}.images_per_prompt must be at most {MAX_IMAGES}, not {images_per_prompt}")
        self.save_hyperparameters(logger=False)
        self.prompts_per_round = prompts_per_round
        self.images_per_prompt = images_per_prompt
        self.passes = passes
        self.batch_size = batch_size
        self.seed = seed
        self.position = DataPosition()
        """Where training stands in the data."""

    def setup(self, stage: str | None = None) -> None:
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        deal = self._deal()
        if not deal.batches(self.prompts_per_round):
            raise UserError(
                f"{KEY}.prompts_per_round is {self.prompts_per_round}, fewer than one step needs: {deal.batch_size} "
                f"({KEY}.batch_size) x {deal.world} (ranks) x {deal.accumulate} (trainer.accumulate_grad_batches)"
            )
        if trainer.current_epoch == 0 and trainer.global_step == 0:  # else a fit that continues
            self.position = DataPosition()
        self.position.trainer = trainer
        self.position.signature = {
            f"{KEY}.prompts_per_round": self.prompts_per_round,
            f"{KEY}.images_per_prompt": self.images_per_prompt,
            f"{KEY}.passes": self.passes,
            f"{KEY}.seed": self.seed,
            f"{KEY}.batch_size x ranks x trainer.accumulate_grad_batches": deal.batch_size
            * deal.world
            * deal.accumulate,
            "the batches of a rank": deal.batches(self.prompts_per_round),
        }

    def _deal(self) -> Deal:
        trainer: Any = self.trainer
        if trainer is None:
            return Deal(self.batch_size)
        return Deal(self.batch_size, trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)

    def train_dataloader(self) -> RoundLoader:
        return RoundLoader(self, self._deal(), self.position)

    def val_dataloader(self) -> list[Any]:
        """None: callbacks draw validation prompts."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""
        return self.position.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position.load_state_dict(state_dict)


class RoundLoader:
    """Batches of one rank, pass after pass; see `PairLoader` for why it is no torch `DataLoader`."""

    def __init__(self, data: RoundData, deal: Deal, position: DataPosition) -> None:
        self.data = data
        self.deal = deal
        self.position = position

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return self.deal.batches(self.data.prompts_per_round)

    def __iter__(self) -> Iterator[PairBatch]:
        position = self.position
        position.begin()
        epoch = position.epoch
        order = permutation(self.data.prompts_per_round, "round", self.data.seed, epoch)
        for number in range(position.first, len(self)):
            start, stop = self.deal.span(number, self.data.prompts_per_round)
            position.hand_out()
            yield self._batch(epoch, [int(one) for one in order[start:stop]])

    def _batch(self, epoch: int, prompts: list[int]) -> PairBatch:
        number, seed = epoch // self.data.passes, self.data.seed
        places = [(prompt, image) for prompt in prompts for image in range(self.data.images_per_prompt)]
        keys = [place_key(number, prompt, image) for prompt, image in places]
        of_prompts = [sample_seed(seed, epoch, f"{number} {prompt}") for prompt, _ in places]
        return places_batch(keys, [sample_seed(seed, epoch, key) for key in keys], of_prompts)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, for Lightning's checkpoints."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.position.load_state_dict(state)


def places_batch(keys: list[str], seeds: list[int], of_prompts: list[int]) -> PairBatch:
    """A batch of places, of which nothing else is known yet.

    Args:
        keys: of `place_key`.
        seeds: each place's own.
        of_prompts: each place's seed of timestep and noise, which the images of a prompt share.
    """
    unknown, size = float("nan"), len(keys)
    return PairBatch(
        keys=keys,
        seeds=seeds,
        prompts=[""] * size,
        prompt_kinds=["harmful"] * size,
        categories=[()] * size,
        orders=["composite"] * size,
        chosen=None,
        rejected=None,
        clean=torch.zeros(size),
        harmful=torch.full((size, 2), unknown),
        cost=torch.full((size, 2), unknown),
        has_cost=[False] * size,
        score=torch.full((size, 2), unknown),
        has_score=[False] * size,
        has_harmful=[False] * size,
        user_ids=[None] * size,
        fixed_seeds=of_prompts,
    )
