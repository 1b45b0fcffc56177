"""Before weights are loaded: were the data's caches made by the model that is trained, do they hold what it needs?"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_safety.backbones.fingerprint import reference_fingerprint
from lit_safety.backbones.load import family_of
from lit_safety.data.cache import check_model
from lit_safety.data.cached_source import CachedSource
from lit_safety.errors import UserError
from lit_safety.objectives import Objective


def check_caches(datamodule: Any, pretrained: str, stage: str) -> None:
    """Compare the caches that ``datamodule`` reads in ``stage`` with the encoders of ``pretrained``.

    Encoders whose files are not there cannot be compared: a run from a cache does not need them, and the log says so.

    Raises:
        UserError: a cache was made by another model; names both.
    """
    found = _caches(datamodule, stage)
    weights = family_of(pretrained).fingerprint(pretrained) if found else {}
    for one in found:
        if unknown := check_model(one.cache, pretrained, weights, one.key):
            rank_zero_info(
                f"{one.key}: {', '.join(unknown)} of {pretrained} is not there to be compared with the cache's, "
                f"which {one.cache.model} made"
            )


def check_references(datamodule: Any, pretrained: str, stage: str, objective: Objective, drops: bool) -> None:
    """Whether the reference caches that are read were made by the denoiser of ``pretrained`` and hold what is needed;
    tells ``datamodule`` whether predictions are to be read.

    Args:
        datamodule: any; one of somebody's own has no caches.
        pretrained: the model that is trained.
        stage: `fit`, `validate`, `test` or `predict`.
        objective: what is computed on errors.
        drops: whether prompts are dropped in training.

    Raises:
        UserError: naming the cache and what it lacks.
    """
    for one in _caches(datamodule, stage):
        if (reference := one.cache.reference) is None:
            continue
        own = reference_fingerprint(pretrained, family_of(pretrained).DENOISER)
        for name in {**reference.weights, **own}:
            if own.get(name) != (made := reference.weights.get(name)):
                raise UserError(
                    f"{one.key}: the reference cache was made by {one.cache.model} ({name} {_short(made)}), but this "
                    f"run's model is {pretrained} ({name} {_short(own.get(name))}); make it anew with `shards "
                    f"precompute --model {pretrained}`, or set data.init_args.use_reference to false"
                )
        kind = type(objective).__name__
        if objective.needs_drift and not reference.predictions:
            what = "anchor_weight" if objective.anchor_weight > 0 else "what it computes"
            raise UserError(
                f"{one.key}: {kind} needs the reference's predictions for {what}, and the reference cache holds its "
                "errors alone: make it anew with `shards precompute --reference_predictions true`, set "
                "objective.init_args.anchor_weight to 0, or data.init_args.use_reference to false"
            )
        if drops and stage == "fit" and not reference.empty:
            raise UserError(
                f"{one.key}: prompts are dropped in training, and the reference cache holds no errors without the "
                "prompt: make it anew with `shards precompute --reference_dropout true`, or set every dropout of a "
                "prompt to 0"
            )
        datamodule.reference_predictions = objective.needs_drift


def _short(found: str | None) -> str:
    return "not found" if found is None else found[:8]


def reference_cached(datamodule: Any, stage: str) -> bool:
    """Whether all that ``datamodule`` reads in ``stage`` comes with the reference's errors, so that it never runs."""
    found = _caches(datamodule, stage)
    if not found or any(one.cache.reference is None for one in found):
        return False
    needed = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
    given = [name for name in needed if getattr(datamodule, name, None) is not None]
    return len(found) == len(given)


def _caches(datamodule: Any, stage: str) -> list[CachedSource]:
    caches = getattr(datamodule, "caches", None)
    return [] if caches is None else caches(stage)
