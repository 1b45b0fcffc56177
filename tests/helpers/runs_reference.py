"""Modules that do something else with a reference cache than train on it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import SCDPO
from lit_safety.objectives import PairErrors


class RunsReference(SCDPO):
    """Takes timestep and noise from the cache and runs the reference all the same."""

    def errors(self, batch: PairBatch) -> PairErrors:
        return super().errors(replace(batch, reference=None, reference_prediction=None))


class LateTimesteps(SCDPO):
    """Trains at the noisy half of the schedule."""

    def timesteps(self, batch: PairBatch) -> Tensor:
        return super().timesteps(batch) // 2 + 500


class NoCopy(SCDPO):
    """Fails where a frozen copy of the denoiser is made."""

    def configure_policy(self) -> None:
        super().configure_policy()
        assert self._frozen is None
