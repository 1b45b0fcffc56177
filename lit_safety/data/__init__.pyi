"""Preference pairs: the shard format, and the datamodule that streams it."""

from .datamodule import PreferenceDataModule as PreferenceDataModule
from .format.sample import PairMetadata as PairMetadata
from .format.writer import ShardWriter as ShardWriter
from .reading.batch import PairBatch as PairBatch
from .rounds import RoundData as RoundData

__all__ = ["PairBatch", "PairMetadata", "PreferenceDataModule", "RoundData", "ShardWriter"]
