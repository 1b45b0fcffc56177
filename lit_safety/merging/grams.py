"""The inputs of every adapted layer along the sampling path, as Gram matrices.

Each expert draws prompts of its own category, and the base draws prompts of what must stay. Hooks sum up X X^T of the
layers' inputs over all steps, separately for the conditional and the unconditional half. G_0 is made from the base's
conditional half, half of the base's unconditional half, and half of the mean of the experts' unconditional halves,
because an expert also changes the result of the empty prompt. An input is measured with an expert only if the expert
adapts a layer that reads it. So the statistics of one expert do not depend on the others and can be kept: merging a
later expert gives the same result as measuring all together.

Layers that read the same tensor (q, k and v; all that read the text) share one matrix. If not all matrices fit into
memory, layers are measured in groups, with the same drawings repeated for each group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_safety.adapters.lora import adapter_layers, adapters_off
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.call import passes_of
from lit_safety.core.chance import sample_seed
from lit_safety.core.errors import UserError
from lit_safety.core.progress import counter
from lit_safety.merging.calibration import base_layer, draw_latents, moved
from lit_safety.merging.experts import Expert, parts_of, united_layers
from lit_safety.merging.options import CalibrationOptions, Recipe
from lit_safety.merging.own_prompts import OwnPrompts
from lit_safety.merging.regmean import Grams

GIGABYTE = 1e9
FREE = 8 * GIGABYTE
"""Used as the free memory if the system does not report it."""
NUMBER = 4
"""Bytes for each number of a Gram matrix."""


# Finding which layers share their inputs, and how much memory the matrices take.


@dataclass(frozen=True)
class Shared:
    """An input that one or several layers read."""

    layers: tuple[str, ...]
    size: int
    """Numbers in a token; for a convolution channels times kernel elements."""

    def bytes(self, experts: int) -> int:
        """Bytes of its Gram matrices while it is measured: one an expert, one for what must stay, one to work on."""
        return NUMBER * self.size**2 * (experts + 2)


def shared_inputs(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> list[Shared]:
    """Which layers read the same tensor in a forward pass. Layers that are not called are left out.

    It works on the meta device too, so that a large network can be planned without its weights.

    Args:
        modules: linear layers and convolutions by name.
        forward: runs the network once.
    """
    seen: dict[str, list[tuple[Any, ...]]] = {}
    held: list[Tensor] = []  # keeps tensors alive, so that no new tensor gets the memory address of an earlier one

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            held.append(x)
            place = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            seen.setdefault(name, []).append((*place, *_geometry(module)))

        return note

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
    for name in sorted(seen):
        groups.setdefault(tuple(seen[name]), []).append(name)
    return [Shared(tuple(names), _width(modules[names[0]])) for names in groups.values()]


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    """The settings of a convolution that decide from which numbers an output is computed."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation


def _width(module: nn.Module) -> int:
    return module.weight.flatten(1).shape[1]  # type: ignore[operator]


def plan(inputs: Sequence[Shared], experts: int, gigabytes: float) -> list[list[Shared]]:
    """Groups of inputs whose Gram matrices fit into memory together; groups are filled by first fit.

    Raises:
        UserError: a single input does not fit.
    """
    room = gigabytes * GIGABYTE
    groups: list[list[Shared]] = []
    left: list[float] = []
    for one in sorted(inputs, key=lambda one: (-one.size, one.layers)):
        needed = one.bytes(experts)
        if needed > room:
            raise UserError(
                f"--calibration.memory {gigabytes:.3g}: the inputs of {one.layers[0]} alone take "
                f"{needed / GIGABYTE:.3g} GB; set it to at least that"
            )
        place = next((n for n, free in enumerate(left) if needed <= free), None)
        if place is None:
            groups.append([])
            left.append(room)
            place = len(groups) - 1
        groups[place].append(one)
        left[place] -= needed
    return groups


def free_memory() -> float:
    """Bytes of this machine's memory that are free or can be freed."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return FREE


# Measuring the Gram matrices.


@dataclass(frozen=True)
class Halves:
    """The Gram matrices (in, in) of one input on one set of prompts, in fp32 on the CPU."""

    conditional: Tensor
    unconditional: Tensor | None
    """None: the images were drawn without guidance."""


class Kept(Protocol):
    """Statistics of an earlier measurement.

    Both methods take an expert, or None for what must stay, and any of the layers that read the input.
    """

    def holds(self, who: str | None, layers: Sequence[str]) -> bool:
        """Whether this input was measured."""

    def halves(self, who: str | None, layers: Sequence[str]) -> Halves:
        """The statistics of this input."""


class Keep(Protocol):
    """A place that keeps statistics."""

    def add(self, who: str | None, halves: Mapping[tuple[str, ...], Halves]) -> None:
        """Keep the statistics of some inputs.

        Args:
            who: an expert; None: what must stay.
            halves: the statistics by the layers that read the input.
        """


@dataclass(frozen=True)
class Looked:
    """Gram matrices of all layers, one group at a time, and what a report says about them."""

    groups: Iterator[dict[str, Grams]]
    """Gram matrices by layer; can be iterated only once."""
    about: dict[str, Any]


@torch.no_grad()
def look(
    backbone: Backbone,
    experts: Sequence[Expert],
    prompts: OwnPrompts,
    recipe: Recipe,
    options: CalibrationOptions,
    kept: Kept | None = None,
    keep: Keep | None = None,
) -> Looked:
    """Find out which layers share inputs, plan the groups, and yield each group's Gram matrices when it is measured.

    Args:
        backbone: the base.
        experts: all experts.
        prompts: prompts of what must stay, and of each expert without kept statistics.
        recipe: the merge for which this is measured.
        options: how images are drawn.
        kept: earlier statistics, which are not measured again.
        keep: keeps the new statistics.

    Raises:
        UserError: the experts were made for another backbone, or a layer's inputs do not fit into memory.
    """
    experts = sorted(experts, key=lambda expert: expert.name)
    names = united_layers(experts)
    what = recipe.method if recipe.own_inputs else "--null_space"
    modules = {
        name: _checked(name, base_layer(backbone.denoiser, name, parts_of(experts, name), what)) for name in names
    }
    looked = experts if recipe.own_inputs else []
    first = list(prompts.clean[:1])
    with _base(backbone):
        inputs = shared_inputs(modules, lambda: _draw(backbone, first, options, steps=1))
    gigabytes = free_memory() / 2 / GIGABYTE if options.memory is None else options.memory
    groups = plan(inputs, len(looked), gigabytes)
    about = {
        **{key: value for key, value in asdict(options).items() if key in ("steps", "guidance", "seed")},
        "prompts by expert": {name: len(prompts.own[name]) for name in sorted(prompts.own)},
        "clean prompts": len(prompts.clean),
        "inputs": len(inputs),
        "gigabytes": sum(one.bytes(len(looked)) for one in inputs) / GIGABYTE,
        "groups": len(groups),
    }
    return Looked(_measured(backbone, looked, prompts, options, modules, groups, kept, keep), about)


def _measured(
    backbone: Backbone,
    experts: Sequence[Expert],
    prompts: OwnPrompts,
    options: CalibrationOptions,
    modules: Mapping[str, nn.Module],
    groups: Sequence[Sequence[Shared]],
    kept: Kept | None,
    keep: Keep | None,
) -> Iterator[dict[str, Grams]]:
    called = {name for group in groups for one in group for name in one.layers}
    yield {name: _unused_input(module, len(experts)) for name, module in modules.items() if name not in called}
    for number, group in enumerate(groups, 1):
        what = "measuring inputs" if len(groups) == 1 else f"measuring inputs, group {number} of {len(groups)}"
        measured = measure(backbone, experts, prompts, options, modules, group, what, kept, keep)
        for one in group:
            yield dict.fromkeys(one.layers, measured.pop(one.layers[0]))


def _unused_input(module: nn.Module, experts: int) -> Grams:
    """The Gram matrices of a layer that is never called: zeros."""
    zero = torch.zeros(1, 1).expand(_width(module), _width(module))
    return Grams((zero,) * experts, zero)


@torch.no_grad()
def measure(
    backbone: Backbone,
    experts: Sequence[Expert],
    prompts: OwnPrompts,
    options: CalibrationOptions,
    modules: Mapping[str, nn.Module],
    group: Sequence[Shared],
    what: str = "measuring inputs",
    kept: Kept | None = None,
    keep: Keep | None = None,
) -> dict[str, Grams]:
    """The Gram matrices of some inputs, by the first layer that reads each input, on the CPU.

    Args:
        backbone: the base, on the device to compute on; its adapters are switched off.
        experts: in the order of their names; empty: only the base is measured.
        prompts: prompts of what must stay, and of each expert without kept statistics.
        options: how images are drawn.
        modules: the layers by name.
        group: the inputs to measure.
        what: text for the progress bar.
        kept: earlier statistics.
        keep: keeps the new statistics.
    """
    by_name = {expert.name: expert for expert in experts}
    here: dict[str | None, list[Shared]] = {None: list(group)}
    for name, expert in by_name.items():
        here[name] = [one for one in group if any(layer in expert.layers for layer in one.layers)]
    new = {who: [one for one in some if kept is None or not kept.holds(who, one.layers)] for who, some in here.items()}
    drawn = {who: prompts.clean if who is None else prompts.own[who] for who, inputs in new.items() if inputs}
    adapting = {one: sum(one in here[name] for name in by_name) for one in group}
    anchors: dict[Shared, Tensor] = {}
    own: dict[Shared, dict[str, Tensor]] = {one: {} for one in group}
    batches = sum(-(-len(some) // options.batch_size) for some in drawn.values())
    # Compiled blocks would ignore hooks that are added later.
    with counter(what, batches) as tick, _base(backbone), torch.compiler.set_stance("force_eager"):
        for who, inputs in here.items():
            found = {}
            if who in drawn:
                sums = {one: _Sum(modules[one.layers[0]], one.size) for one in new[who]}
                with nullcontext() if who is None else acting(by_name[who], modules):
                    _pass(backbone, drawn[who], options, sums.values(), tick)
                found = {one: Halves(*sums[one].take()) for one in new[who]}
                if keep is not None:
                    keep.add(who, {one.layers: halves for one, halves in found.items()})
            for one in inputs:
                halves = found.pop(one) if kept is None or one in found else kept.halves(who, one.layers)
                if who is None:
                    anchors[one] = halves.conditional
                    share = 0.5
                else:
                    own[one][who] = halves.conditional
                    share = 0.5 / adapting[one]
                if halves.unconditional is not None:
                    anchors[one] = anchors[one] + share * halves.unconditional
    none = torch.zeros(1, 1)
    return {
        one.layers[0]: Grams(
            tuple(own[one].get(name, none.expand(one.size, one.size)) for name in by_name), anchors[one]
        )
        for one in group
    }


@contextmanager
def _base(backbone: Backbone) -> Iterator[None]:
    with adapters_off(adapter_layers(backbone.denoiser)):
        yield


def _pass(
    backbone: Backbone,
    prompts: Sequence[str],
    options: CalibrationOptions,
    sums: Collection[_Sum],
    tick: Callable[[], None],
) -> None:
    for start in range(0, len(prompts), options.batch_size):
        batch = list(prompts[start : start + options.batch_size])

        turns = cycle(passes_of(backbone.PIPELINE.__name__, options.guidance))

        def halves(
            module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], size: int = len(batch), turns: Any = turns
        ) -> None:
            given = (*args, *named.values())
            rows = next(len(x) for x in given if isinstance(x, list) or (isinstance(x, Tensor) and x.ndim >= 3))
            found = next(turns)
            if rows != size * len(found):
                if rows != size:
                    raise UserError(
                        f"regmean does not know what a forward pass of {rows} rows for {size} prompts computes"
                    )
                found = (True,)  # drawn without guidance
            for one in sums:
                one.halves = found

        handles: list[Any] = [backbone.denoiser.register_forward_pre_hook(halves, with_kwargs=True)]
        handles += [one.module.register_forward_pre_hook(one) for one in sums]
        try:
            _draw(backbone, batch, options)
        finally:
            for handle in handles:
                handle.remove()
        tick()


def _draw(backbone: Backbone, batch: list[str], options: CalibrationOptions, steps: int | None = None) -> None:
    how = options if steps is None else replace(options, steps=steps)
    draw_latents(backbone, batch, [sample_seed(options.seed, 0, prompt) for prompt in batch], how)


@contextmanager
def acting(expert: Expert, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A context in which the network computes with the expert's update; its weights do not change."""
    handles = []
    for name, part in expert.layers.items():
        if not part.rank:
            continue
        weight: Tensor = modules[name].weight  # type: ignore[assignment]
        handles.append(modules[name].register_forward_hook(_adding(moved(part, weight.device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(part: LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + added(part, module, inputs[0]).to(output.dtype)

    return add


def added(part: LowRank, module: nn.Module, x: Tensor) -> Tensor:
    """What an update adds to the output of a linear layer or a convolution, in fp32.

    Args:
        part: the update, on the input's device.
        module: the layer.
        x: its input.
    """
    x = x.float()
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.Conv2d):
            a = part.a.reshape(part.rank, -1, *part.kernel)
            hidden = nn.functional.conv2d(x, a, None, module.stride, module.padding, module.dilation)
            more = nn.functional.conv2d(hidden, part.b[:, :, None, None])
        else:
            more = (x @ part.a.T) @ part.b.T
    return part.scale * more


class _Sum:
    """X X^T of one layer's inputs, separately for the conditional and the unconditional half, on the layer's device.

    Args:
        module: the layer.
        size: the width of its inputs.
    """

    def __init__(self, module: nn.Module, size: int) -> None:
        self.module = module
        self.size = size
        self.halves: tuple[bool, ...] = (True,)
        """For each part of the next inputs, in order: whether it was computed with the prompt."""
        self._halves: dict[bool, Tensor] = {}
        self._tokens = {False: 0, True: 0}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        with torch.autocast(x.device.type, enabled=False):
            for conditional, rows in zip(self.halves, x.chunk(len(self.halves)), strict=True):
                self._add(conditional, rows)

    def _add(self, conditional: bool, x: Tensor) -> None:
        total = self._halves.get(conditional)
        if total is None:
            total = self._halves[conditional] = torch.zeros(self.size, self.size, device=x.device)
        for columns in self._columns(x):
            total.addmm_(columns, columns.T)
            self._tokens[conditional] += columns.shape[1]

    def _columns(self, x: Tensor) -> Iterator[Tensor]:
        """The inputs as columns (in, tokens); for a convolution one image at a time."""
        if not isinstance(self.module, nn.Conv2d):
            yield x.reshape(-1, self.size).T
            return
        conv = self.module
        padding = conv.padding
        assert not isinstance(padding, str)
        for image in x:
            yield nn.functional.unfold(image[None], conv.kernel_size, conv.dilation, padding, conv.stride)[0]

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Both halves divided by their number of tokens, on the CPU; resets the sums.

        Without guidance the second is None.
        """
        found = {
            half: (total / self._tokens[half]).cpu() if self._tokens[half] else None
            for half, total in self._halves.items()
        }
        self._halves, self._tokens = {}, {False: 0, True: 0}
        conditional = found.get(True)
        return torch.zeros(self.size, self.size) if conditional is None else conditional, found.get(False)


def _checked(name: str, module: nn.Module) -> nn.Module:
    """Return the layer. Raises UserError for a convolution that regmean does not support."""
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if not plain:
            raise UserError(
                f"{name}: regmean does not support convolutions in groups or with padding by name or reflection"
            )
    elif not isinstance(module, nn.Linear):
        raise UserError(f"{name}: is a {type(module).__name__}, but regmean supports only linear layers and Conv2d")
    return module
