"""Before weights are loaded: were the data's caches made by the model that is trained?"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_safety.backbones.fingerprint import fingerprint
from lit_safety.backbones.load import family_of
from lit_safety.data.cache import check_model


def check_caches(datamodule: Any, pretrained: str, stage: str) -> None:
    """Compare the caches that ``datamodule`` reads in ``stage`` with the encoders of ``pretrained``.

    Encoders whose files are not there cannot be compared: a run from a cache does not need them, and the log says so.

    Raises:
        UserError: a cache was made by another model; names both.
    """
    caches = getattr(datamodule, "caches", None)
    if caches is None:  # a datamodule of somebody's own
        return
    found = caches(stage)
    weights = fingerprint(pretrained, family_of(pretrained).ENCODERS) if found else {}
    for one in found:
        if unknown := check_model(one.cache, pretrained, weights, one.key):
            rank_zero_info(
                f"{one.key}: {', '.join(unknown)} of {pretrained} is not there to be compared with the cache's, "
                f"which {one.cache.model} made"
            )
