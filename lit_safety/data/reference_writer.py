"""What `shards precompute` writes of the reference: a few fixed draws of timestep and noise for each pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_safety.data.batch import Pair, PairBatch, collate
from lit_safety.data.chance import fixed_seed
from lit_safety.data.prompt_table import PromptTables
from lit_safety.data.reference_cache import FixedDraw, ReferenceCache, encode_reference

#: A batch, and whether its prompts are dropped -> timesteps (B,), the reference's errors of chosen and rejected (B, 2)
#: and its predictions on the chosen images (B, C, h, w).
Reference = Callable[[PairBatch, bool], tuple[Tensor, Tensor, Tensor]]


class ReferenceWriter:
    """Runs the reference on what a training step will read from the cache: latents and text as they are stored.

    Args:
        reference: the denoiser that a run will call its reference.
        settings: how many draws, and what is stored of them.
        prompts: the text encoders' outputs, written already.
        dtype: how latents and predictions are stored.
    """

    def __init__(self, reference: Reference, settings: ReferenceCache, prompts: PromptTables, dtype: str) -> None:
        self.reference = reference
        self.settings = settings
        self.prompts = prompts
        self.dtype = dtype

    def members(self, pairs: Sequence[Pair], latents: Tensor, mirror: bool) -> list[dict[str, bytes]]:
        """Each pair's members of a shard.

        Args:
            pairs: decoded, with or without images.
            latents: (B, 2, 2, C, h, w), unscaled, of the images or of the mirrored ones.
            mirror: which of the two.

        Raises:
            UserError: the reference's errors are not finite.
        """
        stored = latents.to(getattr(torch, self.dtype)).float().cpu()
        found: list[list[FixedDraw]] = [[] for _ in pairs]
        for number in range(self.settings.draws):
            for row, draw in enumerate(self._draw(pairs, stored, number)):
                found[row].append(draw)
        return [
            encode_reference(draws, mirror, self.dtype, self._keeps_prediction(pair), pair.where)
            for pair, draws in zip(pairs, found, strict=True)
        ]

    def _draw(self, pairs: Sequence[Pair], latents: Tensor, number: int) -> list[FixedDraw]:
        conditions = self.settings.conditions
        drawn = [
            Pair(
                key=pair.key,
                seed=pair.seed,
                metadata=pair.metadata,
                chosen=None,
                rejected=None,
                where=pair.where,
                crops=pair.crops,
                latents=latents[row],
                conditioning=self.prompts.get(pair.metadata.prompt, pair.where),
                draw=FixedDraw(fixed_seed(pair.key, number, self.settings.draws), 0.0, torch.zeros(2, conditions)),
            )
            for row, pair in enumerate(pairs)
        ]
        batch = collate(drawn, empty=self.prompts.empty())
        runs = [self.reference(batch, without) for without in (False, True)[:conditions]]
        timesteps = runs[0][0].double().tolist()
        errors = torch.stack([run[1].float().cpu() for run in runs], dim=2)
        predictions = torch.stack([run[2].float().cpu() for run in runs], dim=1)
        seeds = batch.noise_seeds
        return [
            FixedDraw(
                seeds[row], timesteps[row], errors[row], predictions[row] if self._keeps_prediction(pair) else None
            )
            for row, pair in enumerate(pairs)
        ]

    def _keeps_prediction(self, pair: Pair) -> bool:
        return self.settings.predictions and pair.metadata.prompt_kind == "clean"
