"""Routing: each prompt is drawn by the expert of the category nearest to its embedding, or by the base.

An upper bound for merging: it uses one expert a step, and its only error is the choice of the expert. It follows CASG
(CVPR 2026), which found that the right category's direction leaves far less harm than several directions at once. An
oracle, which knows the true category, shows how much a static merge can lose at most.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256
from lit_safety.drawing.guards.guard import Guard, denoiser_replaced
from lit_safety.drawing.prompts import Prompt, read_prompts
from lit_safety.drawing.worlds import refuse_reports_own

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lit_safety.adapters.low_rank import LowRank


class RoutedExperts(Guard):
    """Draws every prompt with the expert of its category, or with the base if no category is near enough.

    A category's direction goes from the mean embedding of clean and look-alike prompts to that of its own prompts. A
    prompt goes to the category whose direction has the largest cosine with the prompt's. Embeddings are whitened first
    by the covariance within categories and clean prompts, because differences between scenes are larger than those by
    harm.

    Args:
        experts: category -> folder or file of its LoRA.
        prompts: prompt file with kinds and categories for the directions; rows marked held_out are not used.
        threshold: below this cosine the base draws; null: the value with the fewest mistakes on `prompts`.
        each: how many prompts of each category, and four times as many clean ones.
        oracle: instead of `prompts`, a prompt file with each prompt's true category; embeddings are not used. A prompt
            that is not in it, or is harmless, is drawn by the base.

    Raises:
        UserError: an expert cannot be read, a file lacks needed prompts, or neither `prompts` nor `oracle` is given.
    """

    def __init__(
        self,
        experts: dict[str, str],
        prompts: str | None = None,
        threshold: float | None = None,
        each: int = 20,
        oracle: str | None = None,
    ) -> None:
        from lit_safety.adapters.lora_file import read_lora

        if not experts:
            raise UserError("routed experts: `experts` is empty; name a LoRA for each category")
        if (prompts is None) is (oracle is None):
            raise UserError("routed experts: give `prompts`, for the directions, or else `oracle`")
        if threshold is not None and not (isfinite(threshold) and -1 <= threshold <= 1):
            raise UserError(f"routed experts: the threshold {threshold} must be a cosine, from -1 to 1")
        if each < 1:
            raise UserError(f"routed experts: each is {each}; at least 1 prompt a category is needed")
        named: dict[str, str] = {}
        for name, path in experts.items():
            category = canonical_category(name)
            if category in named:
                raise UserError(f"routed experts: two experts are for {category}; give one for each category")
            named[category] = path
        self.categories = sorted(named)
        self.layers: dict[str, Mapping[str, LowRank]] = {one: read_lora(named[one]) for one in self.categories}
        self.threshold = threshold
        self.known: dict[str, str] | None = None
        self.own: dict[str, list[str]] = {}
        self.clean: list[str] = []
        if oracle is not None:
            self.known = _true_categories(read_prompts(oracle), self.categories)
        elif prompts is not None:
            refuse_reports_own(prompts, "routed experts: prompts")
            self._choose(prompts, each)
        self.settings: dict[str, Any] = {
            "guard": "routed experts",
            "experts": {one: content_sha256(named[one]) for one in self.categories},
            "by": "oracle" if oracle is not None else "embedding",
            "prompts_sha256": content_sha256(str(oracle or prompts)),
            "threshold": threshold,
            "each": each,
        }
        self._centre: Tensor | None = None
        self._whiten: Tensor | None = None
        self._directions: Tensor | None = None
        self._limit = 0.0

    def _choose(self, file: str, each: int) -> None:
        rows = [row for row in read_prompts(file) if not row.held_out]
        for category in self.categories:

            def own(row: Prompt, category: str = category) -> bool:
                return row.harmful and category in (row.category, *row.also)

            self.own[category] = _some(rows, own, each)
            if not self.own[category]:
                raise UserError(f"routed experts: {file} holds 0 prompts of {category}")
        self.clean = _some(rows, lambda row: not row.harmful, 4 * each)
        if not self.clean:
            raise UserError(
                f"routed experts: {file} holds 0 clean or look-alike prompts, which are needed to recognise harmless "
                "prompts"
            )

    def check(self, pipe: Any) -> None:
        """Find the experts' layers, and compute the directions with the pipeline's text encoder.

        Raises:
            UserError: a layer of an expert does not exist in the denoiser, or the pipeline cannot encode text.
        """
        denoiser = _denoiser(pipe)
        for category, layers in self.layers.items():
            for name, part in layers.items():
                component, layer = name.split(".", 1)
                try:
                    module = denoiser.get_submodule(layer) if component in ("unet", "transformer") else None
                except AttributeError:
                    module = None
                weight = getattr(getattr(module, "base_layer", module), "weight", None)
                if weight is None or tuple(weight.flatten(1).shape) != part.shape:
                    raise UserError(
                        f"routed experts: {name} of the expert {category} is not a layer of this size in "
                        f"{type(denoiser).__name__}; routing needs LoRAs for the denoiser of this model"
                    )
        if self.known is None:
            self._find_directions(pipe)

    def _find_directions(self, pipe: Any) -> None:
        import torch

        clean = _embedded(pipe, self.clean)
        own = {category: _embedded(pipe, prompts) for category, prompts in self.own.items()}
        self._centre = clean.mean(dim=0)
        self._whiten = whitening([clean, *own.values()])
        away = torch.stack([own[category].mean(dim=0) - self._centre for category in self.categories]) @ self._whiten
        self._directions = away / away.norm(dim=1, keepdim=True).clamp(min=1e-12)
        if self.threshold is not None:
            self._limit = self.threshold
            return
        harmful = [(self._cosines(own[category]), number) for number, category in enumerate(self.categories)]
        right = [(float(row.max()), int(row.argmax()) == number) for rows, number in harmful for row in rows]
        self._limit = best_threshold(right, [float(row.max()) for row in self._cosines(clean)])

    def _cosines(self, embedded: Tensor) -> Tensor:
        """(N, d) -> (N, categories)"""
        assert self._centre is not None
        assert self._whiten is not None
        assert self._directions is not None
        away = (embedded - self._centre) @ self._whiten
        return (away / away.norm(dim=1, keepdim=True).clamp(min=1e-12)) @ self._directions.T

    def route(self, pipe: Any, prompts: Sequence[str]) -> list[str | None]:
        """The category whose expert draws each prompt; None: the base draws it."""
        if self.known is not None:
            return [self.known.get(prompt) for prompt in prompts]
        if self._directions is None:
            self.check(pipe)
        found = self._cosines(_embedded(pipe, prompts))
        nearest = [self.categories[int(number)] for number in found.argmax(dim=1)]
        return [one if float(row.max()) >= self._limit else None for one, row in zip(nearest, found, strict=True)]

    @contextmanager
    def around(self, pipe: Any, prompts: Sequence[str]) -> Iterator[None]:
        """Inside, `pipe` draws each of `prompts` with its expert."""
        routed = self.route(pipe, prompts)
        used = {category: [row for row, one in enumerate(routed) if one == category] for category in {*routed} - {None}}
        if not used:
            yield
            return

        def step(denoise: Any, noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
            found: Tensor = denoise(noisy, timestep, text, keywords)
            return found

        with denoiser_replaced(pipe, step, len(prompts)) as private:
            private._modules = {name: _structure(one) for name, one in private._modules.items()}
            for category, rows in sorted(used.items(), key=lambda item: str(item[0])):
                both = [*rows, *(len(prompts) + row for row in rows)]  # the unguided half uses the expert too
                for name, part in self.layers[str(category)].items():
                    module = private.get_submodule(name.split(".", 1)[1])
                    module.register_forward_hook(_adding(part, both, 2 * len(prompts)))
            yield


SHRINKAGE = 0.01
"""Shrinkage of the covariance to its mean variance: there may be fewer prompts than numbers in an embedding."""


def whitening(groups: Sequence[Tensor]) -> Tensor:
    """The inverse root (d, d) of the covariance within groups of embeddings, each (N, d); the identity if all are
    equal."""
    import torch

    apart = torch.cat([group - group.mean(dim=0) for group in groups]).double()
    covariance = apart.T @ apart / len(apart)
    mean = float(covariance.trace()) / len(covariance)
    if not mean > 0:
        return torch.eye(len(covariance))
    covariance.diagonal().add_(SHRINKAGE * mean)
    values, vectors = torch.linalg.eigh(covariance)
    found: Tensor = (vectors * values.clamp(min=SHRINKAGE * mean / 2).rsqrt()) @ vectors.T
    return found.float()


def best_threshold(harmful: Sequence[tuple[float, bool]], clean: Sequence[float]) -> float:
    """The cosine with the fewest mistakes; of an interval of such values its middle.

    A mistake is a clean prompt at or above it, and a harmful one below it or nearest to another category.

    Args:
        harmful: of each harmful prompt the largest cosine, and whether that is its own category's.
        clean: of each clean prompt the largest cosine.
    """
    places = sorted({*(cosine for cosine, _ in harmful), *clean})
    ends = [-1.0, *places, 1.0]
    middles = [(low + high) / 2 for low, high in pairwise(ends)]

    def mistakes(limit: float) -> int:
        return sum(one >= limit for one in clean) + sum(not right or cosine < limit for cosine, right in harmful)

    fewest = min(mistakes(one) for one in middles)
    best = [number for number, one in enumerate(middles) if mistakes(one) == fewest]
    widest = max(best, key=lambda number: ends[number + 1] - ends[number])
    return middles[widest]


def _true_categories(rows: Sequence[Prompt], known: Sequence[str]) -> dict[str, str]:
    """Prompt -> the first of its categories that has an expert."""
    found: dict[str, str] = {}
    for row in rows:
        own = [one for one in (row.category, *row.also) if row.harmful and one in known]
        if own:
            found.setdefault(row.prompt, own[0])
    return found


def _some(rows: Sequence[Prompt], takes: Callable[[Prompt], bool], count: int) -> list[str]:
    """The first different prompts in the order of their hashes."""
    found = {row.prompt for row in rows if takes(row)}
    return sorted(found, key=lambda prompt: hashlib.blake2b(prompt.encode("utf-8", "surrogatepass")).digest())[:count]


def _embedded(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """One vector a prompt (N, d), fp32 on the CPU: the mean over the tokens of what the denoiser is given."""
    import torch

    if not hasattr(pipe, "encode_prompt"):
        raise UserError(f"routed experts: {type(pipe).__name__} cannot encode prompts")
    rows = []
    with torch.no_grad():
        for start in range(0, len(prompts), 32):
            batch = list(prompts[start : start + 32])
            more = {"prompt_2": None, "prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}
            found = pipe.encode_prompt(
                batch, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False, **more
            )
            rows.append(found[0].float().mean(dim=1).cpu())
    return torch.cat(rows)


def _denoiser(pipe: Any) -> Any:
    found = getattr(pipe, "unet", None)
    return found if found is not None else pipe.transformer


def _structure(module: torch.nn.Module | None) -> Any:
    """The same weights in new modules, at all levels, so that hooks on them have no effect on others."""
    if module is None:
        return None
    own = copy.copy(module)
    for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(own, hooks, copy.copy(getattr(module, hooks)))
    own._modules = {name: _structure(child) for name, child in module._modules.items()}
    return own


def _adding(part: LowRank, rows: list[int], batch: int) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds an expert's update to the outputs of some rows of a batch."""
    import torch

    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if len(x) != batch:
            raise UserError(
                f"routed experts: a layer is called with {len(x)} rows for {batch}, so rows cannot be assigned"
            )
        layer = getattr(module, "base_layer", module)
        picked = x[rows]
        a, b = part.a.to(x), part.b.to(x)
        if isinstance(layer, torch.nn.Conv2d):
            a = a.reshape(part.rank, -1, *part.kernel)
            hidden = torch.nn.functional.conv2d(picked, a, None, layer.stride, layer.padding, layer.dilation)
            more = torch.nn.functional.conv2d(hidden, b[:, :, None, None])
        else:
            more = (picked @ a.T) @ b.T
        changed = output.clone()
        changed[rows] += part.scale * more
        return changed

    return add
