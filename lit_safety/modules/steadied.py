"""Training steps with stability settings: the guard, the moving reference, and the images' own noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.data.protocols import Mirroring, PairData
from lit_safety.modules.stability import PlainSteps, Stability, Stepping
from lit_safety.modules.strategies import under_fsdp
from lit_safety.objectives.objective import ObjectiveOutput, PairErrors

if TYPE_CHECKING:
    from lit_safety.data.reading.batch import PairBatch

KEY = "model.init_args.stability"


class SteadiedSteps(PlainSteps):
    """See `Stability`.

    Args:
        settings: the settings, of which at least one is set.

    Raises:
        ValueError: a number is outside its range, or two settings contradict each other.
    """

    def __init__(self, settings: Stability) -> None:
        self.settings = settings
        self._copies: dict[str, Tensor] = {}
        limit, weight = settings.winner_limit, settings.winner_weight
        decay, every = settings.reference_decay, settings.reference_every
        if (limit is not None and not 0 <= limit < float("inf")) or not 0 <= weight < float("inf"):
            raise ValueError(f"winner_limit and winner_weight must not be negative, got {limit} and {weight}")
        if (decay is not None and not 0 <= decay < 1) or every < 1:
            raise ValueError(
                f"reference_decay must lie in [0, 1) and reference_every must be at least 1, got {decay} and {every}"
            )
        if limit is not None and decay is not None:
            raise ValueError(
                "winner_limit is a share of the reference's error, which reference_decay changes: set only one"
            )

    def of_pairs(self) -> list[str]:
        """The settings that act only on pairs, and not on groups that are read whole."""
        found = ["stability.winner_limit"] if self.settings.winner_limit is not None else []
        return found + (["stability.own_noise"] if self.settings.own_noise else [])

    def check(self, module: Stepping, datamodule: object) -> None:
        if self.settings.reference_decay is not None or self.settings.own_noise:
            check_stability(self.settings, module, datamodule)

    # ---- the guard

    def _over(self, errors: PairErrors) -> Tensor:
        """How far each pair's chosen error is above its limit (B,); 0 or negative if it is not above."""
        assert self.settings.winner_limit is not None
        return errors.policy_chosen - (1 + self.settings.winner_limit) * errors.reference_chosen

    def spared(self, errors: PairErrors) -> PairErrors:
        """The errors for the objective: the rejected one is a constant if the chosen one is above its limit."""
        if self.settings.winner_limit is None:
            return errors
        over = self._over(errors).detach() > 0
        return replace(
            errors, policy_rejected=torch.where(over, errors.policy_rejected.detach(), errors.policy_rejected)
        )

    def guarded(self, errors: PairErrors, output: ObjectiveOutput, beta: float) -> ObjectiveOutput:
        """The objective's output, plus the penalty."""
        if self.settings.winner_limit is None:
            return output
        over = self._over(errors).relu()
        logs = {**output.logs, "winner/over": (over.detach() > 0).float()}
        return ObjectiveOutput(output.loss + self.settings.winner_weight * 0.5 * beta * over, logs)

    # ---- the moving reference

    @contextmanager
    def reference(self, module: Stepping) -> Iterator[None]:
        """A context in which the denoiser is the reference of a training step."""
        if self.settings.reference_decay is None or not module.training:
            with module.reference():
                yield
            return
        trained = dict(module.trainable_parameters())
        if not self._copies:
            self._copies = {name: parameter.detach().clone() for name, parameter in trained.items()}
        if self._copies.keys() != trained.keys():
            raise UserError("the checkpoint's moving reference does not fit what is trained: start a new run")
        self._exchange(trained)
        try:
            yield
        finally:
            self._exchange(trained)

    def _exchange(self, trained: dict[str, torch.nn.Parameter]) -> None:
        torch.clear_autocast_cache()  # the cache would give the casts of the parameters' old values
        for name, parameter in trained.items():
            copy = self._copies[name].to(parameter.device)
            self._copies[name], parameter.data = parameter.data, copy

    def follow(self, module: Stepping) -> None:
        """After an optimizer step: update the reference."""
        if self.settings.reference_decay is None or (module.global_step + 1) % self.settings.reference_every:
            return
        with torch.no_grad():
            for name, parameter in module.trainable_parameters():
                self._copies[name].lerp_(parameter, 1 - self.settings.reference_decay)

    def state_dict(self) -> dict[str, Any]:
        """The moving reference."""
        return {"reference": {name: copy.cpu().clone() for name, copy in self._copies.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the moving reference.

        Raises:
            UserError: the settings need a moving reference, but the checkpoint holds none.
        """
        copies = state.get("reference", {})
        if self.settings.reference_decay is not None and not copies:
            raise UserError(
                "the checkpoint holds no moving reference: resume with `model.init_args.stability.reference_decay` null"
            )
        self._copies = dict(copies)

    # ---- noise

    def noise(self, module: Stepping, batch: PairBatch, shape: tuple[int, ...]) -> Tensor:
        """Noise of the images (2B, *shape): chosen, then rejected.

        Each image's own noise, or noise that a pair shares.
        """
        if self.settings.own_noise:
            return own_noise(batch, shape).to(module.device, non_blocking=True)
        return super().noise(module, batch, shape)


def check_stability(stability: Stability, module: Stepping, datamodule: object) -> None:
    """Refuse data, strategies and models that do not work with a moving reference or own noise.

    Raises:
        UserError: a reference cache, which was made with another reference and other noise; weights that a strategy has
            sharded; mirrored images, whose noise is not mirrored; a model that is not a flow-matching one.
    """
    setting = "reference_decay" if stability.reference_decay is not None else "own_noise"
    caches = datamodule.caches("fit") if isinstance(datamodule, PairData) else []
    for one in caches:
        if one.cache.reference is not None:
            raise UserError(
                f"{one.key}: a reference cache holds errors of a reference that does not move, with other noise; set "
                f"data.init_args.use_reference to false, or leave `{KEY}.{setting}` out"
            )
    strategy = module.trainer.strategy
    cut = under_fsdp(module.trainer) or isinstance(strategy, DeepSpeedStrategy)
    if stability.reference_decay is not None and cut:
        raise UserError(
            f"`{KEY}.reference_decay` exchanges whole weights, but {type(strategy).__name__} keeps its own copies of "
            "them: train with `configs/strategies/ddp.yaml`"
        )
    if not stability.own_noise:
        return
    from lit_safety.backbones.load import family_of
    from lit_safety.backbones.settings import FlowSettings

    family = family_of(module.pretrained)
    if not issubclass(family.SETTINGS, FlowSettings):
        raise UserError(
            f"`{KEY}.own_noise`: this works only with flow-matching models, where an image and its noise lie on one "
            f"straight line, but {family.__name__} is none: set it to false"
        )
    if isinstance(datamodule, Mirroring) and datamodule.flip:
        raise UserError(
            f"`{KEY}.own_noise`: the noise is not that of a mirrored image: set `data.init_args.flip` to false"
        )


def own_noise(batch: PairBatch, shape: tuple[int, ...]) -> Tensor:
    """The noise from which images were drawn, float32 (2B, *shape) on the CPU: chosen, then rejected.

    A stock pipeline draws the latents of one image from one CPU generator, so a generator with the same seed repeats
    them.

    Raises:
        UserError: a pair does not give its seeds, or its images were cropped or scaled afterwards.
    """
    for key, origin in zip(batch.keys, batch.origins or [None] * len(batch), strict=True):
        if origin is None:
            raise UserError(
                f"sample {key}: `{KEY}.own_noise` needs the noise from which both images were drawn (`noise_seeds`), "
                "and the size in which they were drawn; pairs made by img2img or by other programs do not give it: "
                "draw pairs with `shards generate --counterpart same_seed`, train at their size, or set it to false"
            )
    known = [origin for origin in batch.origins if origin is not None]
    seeds = [chosen for chosen, _ in known] + [rejected for _, rejected in known]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
