"""An adapter that is added to a network by hooks, switched off in some layers or steps, and measured.

For a layer with weight W and update dW, and an input x:

    size of the update   E|dW x| / E|W x + bias|     norms over the output's features, means over tokens and steps
    gate ratio           the size on harmful prompts / the size on clean ones
    energy within k      |U_k' dW|^2 / |dW|^2        U_k: the k leading left singular vectors of W

For comparison: a random dW has k / out of its energy within k of `out` directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones.call import passes_of
from lit_safety.core.errors import UserError
from lit_safety.core.intervals import Z
from lit_safety.merging.grams import added

KINDS = {"attn1": "self-attention", "attn2": "cross-attention"}
"""Names that diffusers' UNets use for attention to itself and to the text."""


def block_of(layer: str) -> str:
    """The block of a layer: `unet.up_blocks.1.attentions.0...` -> `up_blocks.1`."""
    component, _, rest = layer.partition(".")
    if component.startswith("text_encoder"):
        return component
    found = re.match(r"(\w*blocks\.\d+|\w+)", rest)
    return found[1] if found else rest


def kind_of(layer: str) -> str:
    """What a layer does: `...attn2.to_out.0` -> `cross-attention to_out`; without numbers."""
    names = [name for name in layer.split(".")[1:] if not name.isdigit()]
    own = names[-2:] if len(names) > 1 else names
    return " ".join([KINDS.get(own[0], own[0]), *own[1:]])


@dataclass
class Sizes:
    """Sums of norms for each prompt, layer and range of steps."""

    ranges: int
    update: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> sum over steps of the mean |dW x| of each prompt's tokens (prompts, ranges)."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """The same for |W x + bias|."""

    def add(self, layer: str, rows: Sequence[int], at: int, update: Tensor, base: Tensor, prompts: int) -> None:
        """Add the norms of one step.

        Args:
            layer: the layer's name.
            rows: the numbers of the batch's prompts.
            at: the range that the step belongs to.
            update: |dW x| (B,)
            base: |W x + bias| (B,)
            prompts: the number of all prompts.
        """
        for store, seen in ((self.update, update), (self.base, base)):
            if layer not in store:
                store[layer] = torch.zeros(prompts, self.ranges, dtype=torch.float64)
            store[layer][list(rows), at] += seen.detach().double().cpu()

    def size(self, layer: str, rows: Sequence[int], at: int | None = None) -> float:
        """E|dW x| / E|W x + bias| of a layer over some prompts, in one range of steps or in all steps (None)."""
        part = slice(None) if at is None else at
        update, base = (float(store[layer][list(rows)][:, part].sum()) for store in (self.update, self.base))
        return update / base if base else 0.0

    def of_prompts(self) -> list[float]:
        """For each prompt the mean over layers of |dW x| / |W x + bias|, over all steps."""
        each = [self.update[layer].sum(1) / self.base[layer].sum(1).clamp_min(1e-30) for layer in self.update]
        return [float(value) for value in torch.stack(each).mean(0)]

    def of_base(self) -> list[float]:
        """For each prompt the mean over layers of |W x + bias|, each layer divided by its mean over prompts.

        It measures the effect of a prompt on the base model, without the adapter.
        """
        each = [self.base[layer].sum(1) / self.base[layer].sum(1).mean().clamp_min(1e-30) for layer in self.base]
        return [float(value) for value in torch.stack(each).mean(0)]


class Acting:
    """An adapter on the networks of a pipeline.

    Args:
        pipe: the pipeline, without the adapter.
        layers: the adapter's updates by `{component}.{layer}`.
        steps: denoising steps of an image.
        guidance: scale of classifier-free guidance.

    Raises:
        UserError: the pipeline does not have a layer of the adapter.
    """

    def __init__(self, pipe: Any, layers: Mapping[str, LowRank], steps: int, guidance: float) -> None:
        self.denoiser = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
        self.network: nn.Module = getattr(pipe, self.denoiser)
        self.passes = passes_of(type(pipe).__name__, guidance) if guidance > 1 else [(True,)]
        self.steps = steps
        self.layers = {name: part for name, part in layers.items() if part.rank}
        self.modules: dict[str, nn.Module] = {}
        for name in self.layers:
            component, _, rest = name.partition(".")
            try:
                self.modules[name] = getattr(pipe, component).get_submodule(rest)
            except AttributeError as error:
                raise UserError(f"the adapter's layer {name} is not in the pipeline") from error
        if not any(name.startswith(f"{self.denoiser}.") for name in self.layers):
            raise UserError(
                f"the adapter does not change the {self.denoiser}; its other layers act only before the steps"
            )
        self.without: frozenset[str] = frozenset()
        """Layers in which the adapter is off."""
        self.pauses: frozenset[int] = frozenset()
        """Steps, counted from 0, in which the adapter is off in the denoiser."""
        self.sizes: Sizes | None = None
        self._rows: Sequence[int] = ()
        self._prompts = 0
        self._calls = 0

    @property
    def step(self) -> int:
        """The step of the denoiser's last call."""
        return (max(self._calls, 1) - 1) // len(self.passes) % self.steps

    def range_of(self, step: int, ranges: int) -> int:
        """The range that a step belongs to, out of ``ranges`` equal ones; 0 is the noisiest."""
        return step * ranges // self.steps

    @contextmanager
    def on(self) -> Iterator[None]:
        """A context in which the networks compute with the adapter, except where it is switched off."""
        self._calls = 0
        handles = [self.network.register_forward_pre_hook(self._count)]
        handles += [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, rows: Sequence[int], prompts: int) -> None:
        """Say which of all prompts the next images belong to."""
        self._rows, self._prompts, self._calls = rows, prompts, 0

    def check(self) -> None:
        """Refuse a sampler that does not call the denoiser exactly once for each step and pass.

        Raises:
            UserError: the number of calls is another one.
        """
        if self._calls % (self.steps * len(self.passes)):
            raise UserError(
                f"the sampler called the denoiser {self._calls} times for {self.steps} steps, so the step of a call "
                "is not known; use a first-order scheduler"
            )

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._calls += 1

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # a torch hook
        weight: Tensor = self.modules[name].weight  # type: ignore[assignment]
        given = self.layers[name]
        part = LowRank(given.a.to(weight.device).float(), given.b.to(weight.device).float(), given.scale, given.kernel)
        in_denoiser = name.startswith(f"{self.denoiser}.")

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            off = name in self.without or (in_denoiser and self.step in self.pauses)
            if off and self.sizes is None:
                return None
            more = added(part, module, inputs[0])
            if self.sizes is not None and in_denoiser:
                self._measure(name, module, more, output)
            return None if off else output + more.to(output.dtype)

        return add

    def _measure(self, name: str, module: nn.Module, more: Tensor, output: Tensor) -> None:
        assert self.sizes is not None
        halves = self.passes[(self._calls - 1) % len(self.passes)]
        if len(output) != len(halves) * len(self._rows):
            raise UserError(
                f"{name}: got {len(output)} rows for {len(self._rows)} prompts, so a row's prompt is not known"
            )
        at = self.range_of(self.step, self.sizes.ranges)
        for conditional, update, base in zip(halves, more.chunk(len(halves)), output.chunk(len(halves)), strict=True):
            if conditional:
                self.sizes.add(name, self._rows, at, norms(module, update), norms(module, base), self._prompts)


def norms(module: nn.Module, values: Tensor) -> Tensor:
    """The mean over tokens of the norm over features: (B, ..., features), or (B, features, H, W) for a convolution."""
    lengths = values.float().norm(dim=1 if isinstance(module, nn.Conv2d) else -1)
    return lengths.reshape(len(values), -1).mean(1)


# Computations on matrices and lists of numbers.


def leading(energies: Sequence[float], share: float) -> int:
    """How many of the largest energies are needed for a share of their sum: for (9, 1) and 0.9 it is 1.

    Args:
        energies: squared singular values, the largest first.
        share: from 0 to 1.
    """
    total, held = sum(energies), 0.0
    for count, one in enumerate(energies, 1):
        held += one
        if held >= share * total * (1 - 1e-12):
            return count
    return len(energies)


def energy_within(weight: Tensor, part: LowRank, shares: Sequence[float]) -> list[dict[str, float]]:
    """How much of an update's energy lies in the base weight's leading left singular vectors.

    Args:
        weight: W (out, ...), flattened to (out, in).
        part: dW.
        shares: shares of W's energy; each gives a number k of leading vectors.

    Returns: for each share `directions` (k), `energy` (the share of dW's energy in them), `random` (k / out).
    """
    u, s, _ = torch.linalg.svd(weight.detach().double().reshape(len(weight), -1).cpu(), full_matrices=False)
    delta = part.delta().cpu()
    total = float(delta.square().sum())
    along = (u.T @ delta).square().sum(1)
    found = []
    for share in shares:
        k = leading(s.square().tolist(), share)
        energy = float(along[:k].sum()) / total if total else 0.0
        found.append({"share": share, "directions": k, "energy": energy, "random": k / len(weight)})
    return found


def random_like(
    energies: Mapping[str, float], unit: Sequence[str], count: int, generator: torch.Generator, tries: int = 600
) -> list[list[str]]:
    """Random sets of layers for comparison with a unit: as many layers, and nearly the same energy.

    ``tries`` sets are drawn. Of those that share at most half of their layers with the unit, the sets with the closest
    energy are returned. There may be fewer than ``count``, or none.

    Args:
        energies: |dW|^2 of every layer.
        unit: the unit's layers.
        count: the number of sets.
        generator: draws the sets.
        tries: the number of sets that are drawn.
    """
    names, own = sorted(energies), set(unit)
    wanted = sum(energies[name] for name in unit)
    away: dict[tuple[str, ...], float] = {}
    for _ in range(tries):
        order = torch.randperm(len(names), generator=generator)[: len(own)].tolist()
        chosen = tuple(sorted(names[i] for i in order))
        if 2 * len(own & set(chosen)) <= len(own):
            away.setdefault(chosen, abs(sum(energies[name] for name in chosen) - wanted))
    return [list(chosen) for chosen in sorted(away, key=lambda one: away[one])[:count]]


def random_steps(steps: int, pause: Sequence[int], count: int, generator: torch.Generator) -> list[list[int]]:
    """Different random sets of as many steps as ``pause`` has, without ``pause`` itself.

    Args:
        steps: the number of all steps.
        pause: the steps that are paused, counted from 0.
        count: the number of sets.
        generator: draws the sets.
    """
    found: list[list[int]] = []
    for _ in range(100 * count):
        chosen = sorted(torch.randperm(steps, generator=generator)[: len(pause)].tolist())
        if chosen not in (sorted(pause), *found):
            found.append(chosen)
        if len(found) == count:
            break
    return found


def auc(scores: Sequence[float], hits: Sequence[bool]) -> dict[str, Any]:
    """Area under the ROC curve: the share of (hit, other) pairs in which the hit has the higher score.

    Ties count half. The interval is that of Hanley and McNeil (1982).

    Args:
        scores: one number for each item.
        hits: for each item, whether it is a hit.

    Returns: `value` (None without hits or without others), `interval`, `hits`, `others`.
    """
    ours = [score for score, hit in zip(scores, hits, strict=True) if hit]
    others = [score for score, hit in zip(scores, hits, strict=True) if not hit]
    n, m = len(ours), len(others)
    if not n or not m:
        return {"value": None, "interval": [0.0, 1.0], "hits": n, "others": m}
    won = sum((a > b) + 0.5 * (a == b) for a in ours for b in others)
    area = won / (n * m)
    q, r = area / (2 - area), 2 * area * area / (1 + area)
    spread = area * (1 - area) + (n - 1) * (q - area * area) + (m - 1) * (r - area * area)
    half = Z * sqrt(max(spread, 0.0) / (n * m))
    return {"value": area, "interval": [max(0.0, area - half), min(1.0, area + half)], "hits": n, "others": m}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation. None: there are fewer than 3 points, or all values of ``x`` or ``y`` are equal."""
    if len(x) < 3:
        return None
    a, b = (torch.tensor(_ranks(values), dtype=torch.float64) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks, counted from 1; equal values all get the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    for i in order:
        same = [n for n, j in enumerate(order, 1) if values[j] == values[i]]
        ranks[i] = sum(same) / len(same)
    return ranks
