"""Measures the experts' activity for comerge."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_safety.adapters.lora import adapter_layers, adapters_off
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones.backbone import Backbone
from lit_safety.core.categories import canonical_category
from lit_safety.core.chance import generator, normal, sample_seed
from lit_safety.core.errors import UserError
from lit_safety.core.progress import counter
from lit_safety.core.tables import check_header, unescaped
from lit_safety.core.text import NotUtf8, read_text
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from lit_safety.data.reading.select import Filter, Selection, take
from lit_safety.data.reading.source import Source, open_source
from lit_safety.merging.experts import Expert, parts_of, united_layers
from lit_safety.merging.methods import Activity
from lit_safety.merging.options import CalibrationOptions

# Choosing the prompts on which experts are compared: equally many of each category, the same ones every time.


KEY = "--calibration.prompts"


def calibration_prompts(source: str | Sequence[str], count: int, categories: Sequence[str] | None = None) -> list[str]:
    """Up to ``count`` different prompts of a CSV file, or of shards in any form that a datamodule takes.

    A prompt of several categories counts for each of them, but is taken only once.

    Raises:
        UserError: the source cannot be read, does not give categories although some are asked for, or no prompt is
            left.
    """
    wanted = _wanted(source, categories)
    by_category: dict[str, set[str]] = {}
    for prompt, found in _of_csv(Path(str(source))) if _is_csv(source) else _of_shards(source, wanted):
        for category in found or ("",):
            if prompt and (wanted is None or category in wanted):
                by_category.setdefault(category, set()).add(prompt)
    # Sorted by a hash, so that the order in the file does not matter, and the first 16 are also among the first 64.
    columns = [sorted(by_category[category], key=_rank) for category in sorted(by_category)]
    dealt = [prompt for prompt in chain.from_iterable(zip_longest(*columns)) if prompt is not None]
    chosen = list(dict.fromkeys(dealt))[:count]
    if not chosen:
        raise _none_found(source, wanted)
    return chosen


def check_prompts(source: str | Sequence[str], categories: Sequence[str] | None = None) -> None:
    """Refuse a source in which `calibration_prompts` would find no prompt. Of shards only the manifest is read.

    Raises:
        UserError: as `calibration_prompts`.
    """
    if _is_csv(source):
        calibration_prompts(source, 1, categories)
    elif not _harmful(source, wanted := _wanted(source, categories))[1].total:
        raise _none_found(source, wanted)


def _wanted(source: str | Sequence[str], categories: Sequence[str] | None) -> set[str] | None:
    if categories is None:
        return None
    if not has_categories(source):
        raise UserError(f"--calibration.categories: {source} has no column `category`; leave them out, or add it")
    try:
        return {canonical_category(name) for name in categories}
    except UserError as error:
        raise UserError(f"--calibration.categories: {error}") from error


def _none_found(source: str | Sequence[str], wanted: set[str] | None) -> UserError:
    of = "" if wanted is None else f" of {', '.join(sorted(wanted))}"
    return UserError(f"{KEY} {source}: holds no harmful prompt{of}")


def has_categories(source: str | Sequence[str]) -> bool:
    """Whether ``source`` gives its prompts' categories: always, except for a CSV file without the column `category`.

    Raises:
        UserError: it is a CSV file that cannot be read or has no prompts.
    """
    if not _is_csv(source):
        return True
    with _opened(Path(str(source))) as reader:
        return "category" in (reader.fieldnames or [])


def _is_csv(source: str | Sequence[str]) -> bool:
    return isinstance(source, str) and source.endswith(".csv")


def _of_csv(file: Path) -> Iterator[tuple[str, Sequence[str]]]:
    with _opened(file) as reader:
        categorised = "category" in (reader.fieldnames or [])
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{KEY} {file}, line {reader.line_num}: has more or fewer fields than the header")
            named = [name for name in (row.get("category") or "").split(",") if name.strip()]  # "hate, violence" is two
            try:
                found = [canonical_category(name) for name in named]
            except UserError as error:
                raise UserError(f"{KEY} {file}, line {reader.line_num}: {error}") from error
            if found or not categorised:
                yield unescaped(row["prompt"]).strip(), found


@contextmanager
def _opened(file: Path) -> Iterator[csv.DictReader[str]]:
    """The rows of a CSV file with a column `prompt`; errors while reading name the file."""
    try:
        with io.StringIO(read_text(file), newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            reader.fieldnames = check_header(reader.fieldnames or [], f"{KEY} {file}", ("prompt", "category"))
            if "prompt" not in (reader.fieldnames or []):
                raise UserError(f"{KEY} {file}: has no column `prompt`")
            yield reader
    except OSError as error:
        raise UserError(f"{KEY} {file}: cannot be read ({error.strerror})") from error
    except NotUtf8 as error:
        raise UserError(f"{KEY} {error}") from error
    except csv.Error as error:
        raise UserError(f"{KEY} {file}: is not a CSV file ({error})") from error


def _harmful(given: str | Sequence[str], wanted: set[str] | None) -> tuple[Source, Selection]:
    source = open_source(given, KEY)
    categories = None if wanted is None else tuple(sorted(wanted))
    return source, take(source, Filter(categories=categories, kinds=("harmful",)))


def _of_shards(given: str | Sequence[str], wanted: set[str] | None) -> Iterator[tuple[str, Sequence[str]]]:
    for metadata in read_shards(*_harmful(given, wanted)):
        yield metadata.prompt, metadata.categories


def read_shards(source: Source, selection: Selection) -> Iterator[PairMetadata]:
    """The metadata of the selected samples. Samples that cannot be read are left out with a warning."""
    bad: list[UserError] = []
    with counter("reading prompts, shards", sum(count > 0 for count in selection.counts)) as tick:
        for number, count in enumerate(selection.counts):
            if not count:
                continue
            shard = source.open_shard(number)
            try:
                for index in range(count):
                    position = selection.number(number, index)
                    try:
                        metadata = parse_metadata(shard.read_member(position, "json"), shard.where(position))
                    except UserError as error:
                        bad.append(error)
                        continue
                    yield metadata
            finally:
                shard.close()
            tick()
    if bad:
        rank_zero_warn(f"{KEY}: {len(bad)} samples cannot be read and are left out; the first: {bad[0]}")


def _rank(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()


# Measuring how active each expert is in each output unit, on the inputs that the layers get in the base model.
#
# The base draws the calibration prompts, and its drawings are noised to a few levels. For each batch and level the base
# runs one forward pass with all adapters off, in which every adapted layer's inputs also go through every expert's
# factors. So one pass is enough for all experts, and no input is stored.


def calibrate(
    backbone: Backbone, experts: Sequence[Expert], source: str | Sequence[str], options: CalibrationOptions
) -> tuple[dict[str, Activity], dict[str, Any]]:
    """The experts' activity on prompts of ``source``, and what a report says about it. Shows a progress bar.

    Raises:
        UserError: there are no prompts, or the experts were made for another backbone.
    """
    prompts = calibration_prompts(source, options.count, options.categories)
    with counter("looking at the base model", forwards(prompts, options)) as tick:
        activity = measure_activity(backbone, experts, prompts, options, tick)
    return activity, {**asdict(options), "prompts": source, "count": len(prompts)}


def forwards(prompts: Sequence[str], options: CalibrationOptions) -> int:
    """How often `measure_activity` calls ``tick``."""
    return -(-len(prompts) // options.batch_size) * options.timesteps


@torch.no_grad()
def measure_activity(
    backbone: Backbone,
    experts: Sequence[Expert],
    prompts: Sequence[str],
    options: CalibrationOptions,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Activity]:
    """The activity of each expert (in the order of their names) by layer.

    A prompt's contribution depends only on the prompt and ``options.seed``, not on its batch.

    Args:
        backbone: the base, on the device to compute on; its adapters are switched off.
        experts: the experts to compare.
        prompts: the prompts, each counted once.
        options: noise levels, drawing, batch size, seed.
        tick: called after every forward pass.

    Raises:
        UserError: an expert adapts a layer that is not in the denoiser, or that has another size there.
    """
    experts = sorted(experts, key=lambda expert: expert.name)
    device = next(backbone.denoiser.parameters()).device
    probes = {
        name: Probe(base_layer(backbone.denoiser, name, parts), [moved(part, device) for part in parts])
        for name, parts in ((name, parts_of(experts, name)) for name in united_layers(experts))
    }
    activity = {name: Activity.empty(len(experts), *probe.parts[0].shape) for name, probe in probes.items()}
    # Blocks that were compiled for training ignore hooks that are added later, so nothing would be measured.
    with adapters_off(adapter_layers(backbone.denoiser)), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(prompts), options.batch_size):
            batch = list(prompts[start : start + options.batch_size])
            seeds = [sample_seed(options.seed, 0, prompt) for prompt in batch]
            latents = draw_latents(backbone, batch, seeds, options)
            conditioning = backbone.encode_text(batch)
            for level in range(options.timesteps):
                levels = torch.full((len(batch),), (level + 0.5) / options.timesteps, device=device)
                timesteps = backbone.timesteps(levels, (latents.shape[-2], latents.shape[-1]))
                noise = normal(seeds, f"calibration noise {level}", latents.shape[1:]).to(latents)
                with _watched(probes.values()):
                    backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
                tick()
            for name, probe in probes.items():
                seen = probe.take()
                if seen is not None:  # the layer is never called, so its update changes nothing
                    activity[name].add(*seen)
    return activity


def draw_latents(
    backbone: Backbone, prompts: list[str], seeds: list[int], options: CalibrationOptions, resolution: int | None = None
) -> Tensor:
    """The base's drawings of the prompts as latents (B, C, h, w), made by the stock pipeline.

    None as resolution takes the pipeline's own.
    """
    from lit_safety.backbones.call import call_options

    pipe, side = backbone.pipeline(), resolution or options.resolution
    drawn: Tensor = pipe(
        prompt=list(prompts),  # a copy, because Z-Image's pipeline changes the list
        num_inference_steps=options.steps,
        generator=[generator(seed, "calibration drawing") for seed in seeds],
        output_type="latent",
        **call_options(pipe, options.guidance, count=len(prompts)),
        **({} if side is None else {"height": side, "width": side}),
    ).images
    return backbone.drawn_latents(drawn)


class Probe:
    """Passes one layer's inputs through every expert's factors and keeps the mean magnitude of each unit.

    Args:
        module: the base model's linear or convolution layer.
        parts: every expert's update of the layer, on the layer's device.
    """

    def __init__(self, module: nn.Module, parts: Sequence[LowRank]) -> None:
        self.module = module
        self.parts = parts
        self.out = parts[0].shape[0]
        self._sum: Tensor | None = None
        self._inputs: Tensor | None = None
        self._calls = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        with torch.autocast(x.device.type, enabled=False):  # bf16-mixed networks use it
            seen = torch.stack([self._magnitude(part, x) for part in self.parts])
        size = self._size(x)
        self._sum = seen if self._sum is None else self._sum + seen
        self._inputs = size if self._inputs is None else self._inputs + size
        self._calls += 1

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Means over tokens and over all forward passes since the last call: a[k, i, j] (K, B, out) and |x| (B, in).

        None: there was no forward pass.
        """
        if self._sum is None or self._inputs is None:
            return None
        means = self._sum / self._calls, self._inputs / self._calls
        self._sum, self._inputs, self._calls = None, None, 0
        return means

    def _size(self, x: Tensor) -> Tensor:
        """|x| (B, in), the mean over tokens or pixels; for a convolution by channel, once for each kernel element."""
        if self.parts[0].kernel:
            return x.abs().mean(dim=(2, 3)).repeat_interleave(math.prod(self.parts[0].kernel), dim=1)
        return x.abs().reshape(len(x), -1, x.shape[-1]).mean(dim=1)

    def _magnitude(self, part: LowRank, x: Tensor) -> Tensor:
        """|scale * b a x| (B, out), the mean over tokens or pixels of x, (B, ..., in) or (B, C, H, W)."""
        if part.rank == 0:
            return x.new_zeros(len(x), self.out)
        if part.kernel:
            conv: nn.Conv2d = self.module  # type: ignore[assignment]
            weight = part.a.reshape(part.rank, -1, *part.kernel)
            hidden = nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)
            hidden = hidden.flatten(2).transpose(1, 2)
        else:
            hidden = x.reshape(len(x), -1, x.shape[-1]) @ part.a.T
        return (hidden @ part.b.T).abs().mean(dim=1) * abs(part.scale)


@contextmanager
def _watched(probes: Iterable[Probe]) -> Iterator[None]:
    handles = [probe.module.register_forward_pre_hook(probe) for probe in probes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def base_layer(denoiser: nn.Module, name: str, parts: Sequence[LowRank], method: str = "comerge") -> nn.Module:
    """The base layer to which a LoRA layer belongs, after a check of its size.

    Raises:
        UserError: there is no layer of this name and size, or it is in a text encoder, which ``method`` does not
            measure.
    """
    component, layer = name.split(".", 1)
    if component.startswith("text_encoder"):
        instead = "; use another --method" if method != "patch" else ""
        raise UserError(f"{method} measures only the denoiser, but an expert adapts {name}{instead}")
    try:
        module = denoiser.get_submodule(layer)
    except AttributeError:
        raise UserError(
            f"{name} is not a layer of the base model: the experts were made for another backbone"
        ) from None
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    found = None if weight is None else (tuple(weight.flatten(1).shape), tuple(weight.shape[2:]))
    if found != (parts[0].shape, parts[0].kernel):
        size = "no layer with a weight" if weight is None else tuple(weight.shape)
        raise UserError(
            f"{name} is {parts[0].shape[1]} -> {parts[0].shape[0]} in the experts but {size} in the base model: the "
            "experts were made for another backbone"
        )
    return module


def moved(part: LowRank, device: torch.device) -> LowRank:
    """The update in fp32 on a device."""
    return LowRank(part.a.to(device, torch.float32), part.b.to(device, torch.float32), part.scale, part.kernel)
