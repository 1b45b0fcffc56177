"""A patch for a safety update: which rows matter for each, and their sum (after SafePatching, arXiv 2405.13820).

d_SE is the safety update, d_OS a repair that restores what was lost. The loss of a prompt is the distance of the
aligned model's prediction from the base's, L = |aligned - base|^2. x are the inputs of a layer, and g = dL/dy is the
gradient at its outputs. The importance of row i of an update dW is

    I_i = E|g_i| sum_j |dW_ij| E|x_j|

This is SNIP's |dW dL/dW| summed over the row, with each factor replaced by its mean over tokens. For d_SE it is
measured on harmful prompts, for d_OS on what was lost. S and O are the rows with the largest I. The patched update is

    dW = a d_SE + b m d_OS        m_i = 1 where i is in O and not in S, else 0

A mask of rows changes only B, so the sum is exactly one LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.methods import stack
from lit_safety.merging.options import RepairOptions


def row_importance(part: LowRank, inputs: Tensor, gradients: Tensor) -> Tensor:
    """I_i (out,) in fp64 of an update.

    Args:
        part: dW (out, in).
        inputs: E|x_j| (in,).
        gradients: E|g_i| (out,).
    """
    found: Tensor = gradients.double() * (part.delta().abs() @ inputs.double())
    return found


def top_rows(importance: Tensor, share: float) -> Tensor:
    """Which rows (out,) are among the ceil(share * out) rows with the largest importance; of equal rows the first.

    Rows with importance 0 are never among them.
    """
    count = ceil(share * len(importance) - 1e-9)
    order = torch.argsort(importance, descending=True, stable=True)
    chosen = torch.zeros(len(importance), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen & (importance > 0)


def thinned(rows: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """The weight of each row (out,): 0 if it is not chosen or is dropped, else 1 / (1 - drop)."""
    kept = torch.rand(len(rows), generator=generator, dtype=torch.float64) >= drop
    return (rows & kept).double() / (1 - drop)


def patched(safety: LowRank, repair: LowRank, rows: Tensor, a: float = 1.0, b: float = 1.0) -> LowRank:
    """a d_SE + b m d_OS of one layer, exactly.

    Args:
        safety: d_SE.
        repair: d_OS.
        rows: m (out,).
        a: strength of safety.
        b: strength of the repair.
    """
    return stack([safety, repair], [a, b * rows.double()[:, None]])


# Measuring how large inputs and gradients are.


@dataclass(frozen=True)
class Sizes:
    """The mean sizes of one layer's inputs and gradients."""

    inputs: Tensor
    """E|x_j| (in,); for a convolution the channel's mean for each kernel element."""
    gradients: Tensor
    """E|g_i| (out,)"""


class Watch:
    """Sums up |x| and |g| of some layers over forward and backward passes.

    Args:
        modules: linear layers and convolutions by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
        self._gradients: dict[str, list[Tensor]] = {name: [] for name in modules}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which passes are counted. Other hooks on the layers' outputs must be added before."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # a torch hook
        def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # no gradient otherwise; cloned, because later code may change it in place
                output = output.detach().requires_grad_(True).clone()
            self._inputs[name].append(_mean(module, given[0].detach()))
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._gradients[name].append(_mean(module, gradient))
            )
            return output

        return note

    def sizes(self) -> dict[str, Sizes]:
        """Means over all passes; layers that were never called are left out."""
        found = {}
        for name, module in self.modules.items():
            inputs, gradients = self._inputs[name], self._gradients[name]
            if inputs and gradients:
                mean = torch.stack(inputs).mean(0)
                if isinstance(module, nn.Conv2d):
                    mean = mean.repeat_interleave(module.kernel_size[0] * module.kernel_size[1])
                found[name] = Sizes(mean.double().cpu(), torch.stack(gradients).mean(0).double().cpu())
        return found


def _mean(module: nn.Module, x: Tensor) -> Tensor:
    """Mean of |x| over all dimensions except the features: channels (B, C, H, W) for a convolution, else the last."""
    size = x.float().abs()
    return size.mean(dim=(0, 2, 3)) if isinstance(module, nn.Conv2d) else size.reshape(-1, size.shape[-1]).mean(dim=0)


def masks(
    safety: Mapping[str, LowRank],
    repair: Mapping[str, LowRank],
    harmful: Mapping[str, Sizes],
    lost: Mapping[str, Sizes],
    options: RepairOptions,
) -> dict[str, Tensor]:
    """m of every layer that the repair adapts, with rows dropped if the options say so.

    Args:
        safety: the safety updates, which are not changed.
        repair: the updates to mask.
        harmful: sizes on harmful prompts.
        lost: sizes on what was lost.
        options: the shares.
    """
    generator = torch.Generator().manual_seed(options.seed)
    found = {}
    for name in sorted(repair):
        part = repair[name]
        if name not in lost:
            rows = torch.zeros(part.shape[0], dtype=torch.bool)
        else:
            rows = top_rows(row_importance(part, lost[name].inputs, lost[name].gradients), options.repair_share)
        if name in safety and name in harmful:
            own = row_importance(safety[name], harmful[name].inputs, harmful[name].gradients)
            rows &= ~top_rows(own, options.safety_share)
        found[name] = thinned(rows, options.drop, generator)
    return found


def joined(
    safety: Mapping[str, LowRank],
    repair: Mapping[str, LowRank],
    rows: Mapping[str, Tensor],
    a: float,
    b: float,
) -> dict[str, LowRank]:
    """`patched` for every layer that one of the two adapts."""
    found = dict(safety) if a == 1 else {n: LowRank(p.a, p.b, p.scale * a, p.kernel) for n, p in safety.items()}
    for name, part in repair.items():
        out, inputs = part.shape
        none = LowRank(part.a.new_zeros(0, inputs), part.b.new_zeros(out, 0), kernel=part.kernel)
        whole = patched(safety.get(name, none), part, rows[name], a, b)
        found[name] = LowRank(whole.a.float(), whole.b.float(), whole.scale, whole.kernel)
    return found


def masked(repair: Mapping[str, LowRank], rows: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """m d_OS alone: the repair as a separate adapter, to be loaded with the aligned one."""
    return {
        name: LowRank(part.a, (part.b * rows[name].to(part.b)[:, None]), part.scale, part.kernel)
        for name, part in repair.items()
    }


def told(rows: Mapping[str, Tensor]) -> Sequence[float]:
    """The share of rows that the repair acts on, by layer, in the order of their names."""
    return [float((rows[name] > 0).double().mean()) for name in sorted(rows)]
