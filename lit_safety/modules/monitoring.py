"""Monitoring of a run: errors by timestep bin, a stop on a loss that is not finite, a count of prompts that are cut."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone

log = logging.getLogger(__name__)


class TimestepBins(Metric):
    """Mean denoising errors by bin of the noise schedule.

    A preference accuracy near 1 says little about images. Errors at high noise (what is drawn) and at low noise (how it
    looks) can develop differently, and the bins show this.

    Args:
        bins: number of equal bins of [0, 1).
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("sums", torch.zeros(2, bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, fractions: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Add errors (B,) of chosen and rejected at ``fractions`` (B,) of the schedule, in [0, 1)."""
        index = (fractions * self.bins).long().clamp(max=self.bins - 1)
        ones = torch.ones_like(chosen, dtype=self.counts.dtype)
        self.counts.index_add_(0, index, ones)
        self.sums[0].index_add_(0, index, chosen.to(self.sums.dtype))
        self.sums[1].index_add_(0, index, rejected.to(self.sums.dtype))

    def compute(self) -> dict[str, Tensor]:
        """``error/{chosen,rejected}/t{from}-{to}`` in percent of the schedule; a bin without samples gives nan."""
        means = self.sums / self.counts
        edges = [round(100 * i / self.bins) for i in range(self.bins + 1)]
        return {
            f"error/{name}/t{edges[i]:02d}-{edges[i + 1]:02d}": means[row, i].float()
            for row, name in enumerate(("chosen", "rejected"))
            for i in range(self.bins)
        }


class FiniteLossGuard:
    """Stops a run whose loss or gradient is nan or infinite and names the samples. A step does not wait for it.

    Reading a result that a GPU has not computed yet makes the host wait. So the flag of a step is sent to the host when
    the next step begins, and read one step later. Before a checkpoint is written all flags are read. So the last
    checkpoint on disk is always from before the bad step.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._keys: list[str] = []
        self._sent: _SentFlag | None = None

    def watch(self, loss: Tensor, keys: list[str]) -> None:
        """Remember whether ``loss`` () of the samples ``keys`` is finite, with the flags that were not sent yet."""
        self._remember(torch.isfinite(loss.detach()))
        self._keys = [*self._keys, *keys]

    def watch_gradient(self, norm: Tensor) -> None:
        """Remember whether the gradient's norm () is finite; it is the same number on every rank."""
        self._remember(torch.isfinite(norm))

    def _remember(self, finite: Tensor) -> None:
        self._finite = finite if self._finite is None else self._finite & finite

    def advance(self) -> None:
        """Called when a step begins: read the flag of the step before the last, and send that of the last step.

        Raises:
            UserError: loss or gradient was not finite; names the step's sample keys.
        """
        before, self._sent = self._sent, None
        if self._finite is not None:
            self._sent = _SentFlag(self._finite, self._keys)
            self._finite, self._keys = None, []
        if before is not None:
            before.read()

    def check(self) -> None:
        """Read all flags now.

        Raises:
            UserError: as `advance`.
        """
        self.advance()
        self.advance()


class _SentFlag:
    """A flag that is copied to the host, with the keys of its samples."""

    def __init__(self, finite: Tensor, keys: list[str]) -> None:
        self.keys = keys
        self.arrived = None if finite.device.type == "cpu" else torch.Event(finite.device)
        self.finite = finite.to("cpu", non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()  # waits for this copy only, not for later work of the device
        if not bool(self.finite):
            raise UserError(
                f"loss or gradient is not finite at samples {', '.join(self.keys)}: look at them with "
                "`shards inspect`, or lower the learning rate; the last checkpoint is from before this step"
            )


class TruncatedPrompts:
    """Counts the different prompts that are too long for a text encoder, and logs the first one."""

    def __init__(self) -> None:
        self.prompts: dict[bytes, str] = {}
        """Keys are hashes of texts. Only the first prompt's text is kept."""

    def __len__(self) -> int:
        return len(self.prompts)

    def look(self, backbone: Backbone, prompts: Sequence[str]) -> None:
        """Count those of ``prompts`` that are too long; the first one of the run is logged."""
        for prompt, cut in zip(prompts, backbone.too_long(prompts), strict=True):
            if not cut:
                continue
            if not self.prompts:
                log.warning(
                    "a prompt is too long for the text encoder: its end is cut off, the end token is kept; further "
                    "ones are counted: %r",
                    prompt,
                )
            name = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self.prompts.setdefault(name, "" if self.prompts else prompt)
