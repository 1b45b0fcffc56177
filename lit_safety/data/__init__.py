"""Preference pairs: the shard format, and the datamodule that streams it.

The names below are imported when they are first used: writing or checking shards needs neither torch nor
Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_safety.data.batch import PairBatch
    from lit_safety.data.categories import CATEGORIES, canonical_category
    from lit_safety.data.datamodule import PreferenceDataModule
    from lit_safety.data.sample import PairMetadata
    from lit_safety.data.writer import ShardWriter

_HOMES = {
    "CATEGORIES": "categories",
    "PairBatch": "batch",
    "PairMetadata": "sample",
    "PreferenceDataModule": "datamodule",
    "ShardWriter": "writer",
    "canonical_category": "categories",
}

__all__ = [
    "CATEGORIES",
    "PairBatch",
    "PairMetadata",
    "PreferenceDataModule",
    "ShardWriter",
    "canonical_category",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
