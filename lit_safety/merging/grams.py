"""What every adapted layer is fed with along the sampling path, as Gram matrices.

Each expert draws its own category's prompts, the base draws what must stay; hooks sum up X X^T of the layers' inputs
over all steps, conditional and unconditional half apart. G_0 is that of the base's conditional half, of half its
unconditional one, and of half the experts' unconditional ones (their mean): an expert shifts what the empty prompt
leads to.

Layers that are fed with the same tensor (q, k and v; all that read the text) share one matrix. Where all do not fit
into memory, layers are looked at in groups: the same drawings again for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

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
"""Taken for the free memory where the system does not tell it."""
NUMBER = 4
"""Bytes of a number of a Gram matrix."""


# Which layers share their inputs, and how much memory that takes.


@dataclass(frozen=True)
class Shared:
    """An input of one or several layers."""

    layers: tuple[str, ...]
    size: int
    """Numbers a token; of a convolution channels times elements of its kernel."""

    def bytes(self, experts: int) -> int:
        """Of its Gram matrices while it is looked at: one an expert, that of what must stay, and one at work."""
        return NUMBER * self.size**2 * (experts + 2)


def shared_inputs(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> list[Shared]:
    """Which layers are fed with the very same tensor in a forward; one that is not called stands in none.

    Works on the meta device too, so that the plan of a large network is counted without its weights.

    Args:
        modules: linear layers and convolutions by name.
        forward: calls the network once.
    """
    seen: dict[str, list[tuple[Any, ...]]] = {}
    held: list[Tensor] = []  # so that no other tensor gets the place of one that was seen

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
    """What of a convolution decides which numbers an output is computed from."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation


def _width(module: nn.Module) -> int:
    return module.weight.flatten(1).shape[1]  # type: ignore[operator]


def plan(inputs: Sequence[Shared], experts: int, gigabytes: float) -> list[list[Shared]]:
    """Groups of inputs whose Gram matrices fit into memory together, as few as first fit gives.

    Raises:
        UserError: one alone does not.
    """
    room = gigabytes * GIGABYTE
    groups: list[list[Shared]] = []
    left: list[float] = []
    for one in sorted(inputs, key=lambda one: (-one.size, one.layers)):
        needed = one.bytes(experts)
        if needed > room:
            raise UserError(
                f"--calibration.memory {gigabytes:.3g}: the inputs of {one.layers[0]} alone take "
                f"{needed / GIGABYTE:.3g} GB; give as much"
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
    """Bytes of this machine's memory that are free now, or would be if they were asked for."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return FREE


# Measure them.


@dataclass(frozen=True)
class Looked:
    """Gram matrices of all layers, a group at a time, and what a report says of them."""

    groups: Iterator[dict[str, Grams]]
    """By layer; to be gone through once."""
    about: dict[str, Any]


@torch.no_grad()
def look(
    backbone: Backbone, experts: Sequence[Expert], prompts: OwnPrompts, recipe: Recipe, options: CalibrationOptions
) -> Looked:
    """Find out which layers share inputs, plan, and hand out the groups' Gram matrices as they are measured.

    Raises:
        UserError: the experts were made for another backbone, or a layer's inputs do not fit into memory.
    """
    experts = sorted(experts, key=lambda expert: expert.name)
    names = united_layers(experts)
    what = recipe.method if recipe.own_inputs else "--null_space"
    modules = {
        name: _checked(name, base_layer(backbone.denoiser, name, parts_of(experts, name), what)) for name in names
    }
    own = len(experts) if recipe.own_inputs else 0
    first = list(prompts.clean[:1])
    with _base(backbone):
        inputs = shared_inputs(modules, lambda: _draw(backbone, first, options, steps=1))
    gigabytes = free_memory() / 2 / GIGABYTE if options.memory is None else options.memory
    groups = plan(inputs, own, gigabytes)
    about = {
        **{key: value for key, value in asdict(options).items() if key in ("steps", "guidance", "seed")},
        "prompts by expert": {name: len(prompts.own[name]) for name in sorted(prompts.own)},
        "clean prompts": len(prompts.clean),
        "inputs": len(inputs),
        "gigabytes": sum(one.bytes(own) for one in inputs) / GIGABYTE,
        "groups": len(groups),
    }
    return Looked(_measured(backbone, experts if own else [], prompts, options, modules, groups), about)


def _measured(
    backbone: Backbone,
    experts: Sequence[Expert],
    prompts: OwnPrompts,
    options: CalibrationOptions,
    modules: Mapping[str, nn.Module],
    groups: Sequence[Sequence[Shared]],
) -> Iterator[dict[str, Grams]]:
    called = {name for group in groups for one in group for name in one.layers}
    yield {name: _nothing(module, len(experts)) for name, module in modules.items() if name not in called}
    for number, group in enumerate(groups, 1):
        what = "looking at inputs" if len(groups) == 1 else f"looking at inputs, group {number} of {len(groups)}"
        passes = [*(prompts.own[expert.name] for expert in experts), prompts.clean]
        batches = sum(-(-len(some) // options.batch_size) for some in passes)
        with counter(what, batches) as tick:
            measured = measure(backbone, experts, prompts, options, modules, group, tick)
        for one in group:
            grams = measured.pop(one.layers[0])
            yield dict.fromkeys(one.layers, grams)


def _nothing(module: nn.Module, experts: int) -> Grams:
    """Of a layer that is never called."""
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
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Grams]:
    """The Gram matrices of some inputs by the first layer that reads each, on the CPU.

    Args:
        backbone: the base, on the device to compute on; adapters that are on it are switched off.
        experts: in the order of their names; none: only the base is looked at.
        prompts: of each expert, and of what must stay.
        options: how they are drawn.
        modules: the layers by name.
        group: the inputs.
        tick: called after every batch.
    """
    sums = {one.layers[0]: _Sum(modules[one.layers[0]], one.size) for one in group}
    # Compiled blocks would pass by hooks that are set later.
    with _base(backbone), torch.compiler.set_stance("force_eager"):
        _pass(backbone, prompts.clean, options, sums, tick)
        anchors = {}
        for name, one in sums.items():
            conditional, unconditional = one.take()
            anchors[name] = conditional if unconditional is None else conditional + 0.5 * unconditional
        own: dict[str, list[Tensor]] = {name: [] for name in sums}
        for expert in experts:
            with _acting(expert, modules):
                _pass(backbone, prompts.own[expert.name], options, sums, tick)
            for name, one in sums.items():
                conditional, unconditional = one.take()
                own[name].append(conditional)
                if unconditional is not None:
                    anchors[name] += (0.5 / len(experts)) * unconditional
    return {name: Grams(tuple(own[name]), anchors[name]) for name in sums}


@contextmanager
def _base(backbone: Backbone) -> Iterator[None]:
    with adapters_off(adapter_layers(backbone.denoiser)):
        yield


def _pass(
    backbone: Backbone,
    prompts: Sequence[str],
    options: CalibrationOptions,
    sums: Mapping[str, _Sum],
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
                    raise UserError(f"regmean cannot tell what a forward of {rows} rows for {size} prompts computes")
                found = (True,)  # without guidance
            for one in sums.values():
                one.halves = found

        handles: list[Any] = [backbone.denoiser.register_forward_pre_hook(halves, with_kwargs=True)]
        handles += [one.module.register_forward_pre_hook(one) for one in sums.values()]
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
def _acting(expert: Expert, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, the network computes with the expert's update; its weights stay as they are."""
    handles = []
    for name, part in expert.layers.items():
        weight: Tensor = modules[name].weight  # type: ignore[assignment]
        handles.append(modules[name].register_forward_hook(_adding(moved(part, weight.device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(part: LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(module, nn.Conv2d):
                a = part.a.reshape(part.rank, -1, *part.kernel)
                hidden = nn.functional.conv2d(x, a, None, module.stride, module.padding, module.dilation)
                more = nn.functional.conv2d(hidden, part.b[:, :, None, None])
            else:
                more = (x @ part.a.T) @ part.b.T
        return output + (part.scale * more).to(output.dtype)

    return add


class _Sum:
    """X X^T of one layer's inputs, conditional and unconditional half apart, on the layer's device.

    Args:
        module: the layer.
        size: how wide its inputs are.
    """

    def __init__(self, module: nn.Module, size: int) -> None:
        self.module = module
        self.size = size
        self.halves: tuple[bool, ...] = (True,)
        """Of what the next inputs are made, whether with the prompt, in their order."""
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
        """The inputs as columns (in, tokens); of a convolution an image at a time."""
        if not isinstance(self.module, nn.Conv2d):
            yield x.reshape(-1, self.size).T
            return
        conv = self.module
        padding = conv.padding
        assert not isinstance(padding, str)
        for image in x:
            yield nn.functional.unfold(image[None], conv.kernel_size, conv.dilation, padding, conv.stride)[0]

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Both halves divided by their tokens, on the CPU; begins anew. Without guidance there is no second half."""
        found = {
            half: (total / self._tokens[half]).cpu() if self._tokens[half] else None
            for half, total in self._halves.items()
        }
        self._halves, self._tokens = {}, {False: 0, True: 0}
        conditional = found.get(True)
        return torch.zeros(self.size, self.size) if conditional is None else conditional, found.get(False)


def _checked(name: str, module: nn.Module) -> nn.Module:
    """Raises: UserError for a convolution whose inputs are no plain patches."""
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if not plain:
            raise UserError(
                f"{name}: regmean does not look at convolutions in groups or with padding by name or reflection"
            )
    elif not isinstance(module, nn.Linear):
        raise UserError(f"{name}: is a {type(module).__name__}, and regmean looks at linear layers and Conv2d")
    return module
