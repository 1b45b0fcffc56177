"""The shards of a cache: the latents of each sample's images, in the same shards as in the source.

The shards keep their samples and order, so that training on the cache uses the same pairs in the same order as training
on the images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import file_sha256
from lit_safety.core.progress import counter
from lit_safety.core.stages import InOrder
from lit_safety.data.cache.cache import PROMPTS, Cache
from lit_safety.data.cache.encoding import Encoded, How, LatentShape, PairsOf
from lit_safety.data.cache.reference import ReferenceCache
from lit_safety.data.format.manifest import JOURNAL, Manifest
from lit_safety.data.format.tar_index import refuse_twice
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.decode import pair_images
from lit_safety.data.reading.source import Source


@dataclass(frozen=True)
class Settings:
    """The settings that decide the contents of a cache."""

    model: str
    weights: dict[str, str]
    size: tuple[int, int]
    resolution: int | None
    flip: bool
    dtype: str
    images: bool
    reference: ReferenceCache | None = None
    encoder_dtype: str = "float32"
    denoiser_dtype: str = "float32"
    image_encoder_dtype: str = "float32"
    text: bool = True

    @property
    def how(self) -> How:
        """What decides latents and text, next to the model."""
        return How(**{one.name: getattr(self, one.name) for one in fields(How)})

    def to_dict(self, source: Source) -> dict[str, Any]:
        """What the manifest states about how the cache was made, and from what."""
        shards = [sha256 for _, sha256 in source.identity()]
        stated = {**asdict(self), "size": list(self.size), "samples": source.manifest.nsamples, "shards": shards}
        if self.reference is None:
            del stated["reference"]
        # Manifests of before these could be set say nothing of them.
        later: dict[str, Any] = {name: "float32" for name in stated if name.endswith("_dtype")} | {"text": True}
        return {name: value for name, value in stated.items() if name not in later or value != later[name]}


def image_size(source: Source, resolution: int | None) -> tuple[int, int]:
    """Height and width at which every image is encoded: the resolution, or the size of the first sample."""
    if resolution is not None:
        return resolution, resolution
    for number, listed in enumerate(source.manifest.shardlist):
        if listed.nsamples:
            shard = source.open_shard(number)
            try:
                _, chosen, _ = pair_images(shard.read(0)[1], shard.where(0))
            finally:
                shard.close()
            return chosen.height, chosen.width
    raise UserError(f"{source.given}: the shards hold 0 samples")


class LatentWriter:
    """Writes the cached shards and their manifest.

    Args:
        source: the shards with images.
        folder: the output folder, which holds `prompts.safetensors` already, if text is cached.
        settings: how it is made.
        truncated: prompts that are too long for a text encoder.
        overwrite: delete what an earlier run left there.
    """

    def __init__(self, source: Source, folder: Path, settings: Settings, truncated: list[str], overwrite: bool) -> None:
        self.source = source
        self.folder = folder
        self.settings = settings
        self.truncated = truncated
        self.overwrite = overwrite
        self._seen: dict[str, str] = {}
        """The shard of each key."""

    def write(self, batch_size: int, encode: InOrder) -> Manifest:
        """Encode everything that an earlier run has not encoded, ``batch_size`` pairs at once.

        Args:
            batch_size: pairs, or groups, of a batch.
            encode: the results of tasks of an `encoding.Encoder`, in their order.

        Raises:
            UserError: a sample cannot be read, has another size than the others, or its latents are not finite.
        """
        manifest = self.source.manifest
        provenance = {**manifest.provenance, "precompute": self.settings.to_dict(self.source)}
        resumed = (self.folder / JOURNAL).exists() and not self.overwrite
        with (
            ShardWriter(
                self.folder,
                samples_per_shard=max(manifest.nsamples, 1),
                provenance=provenance,
                seeds=manifest.seeds,
                overwrite=self.overwrite,
                resume=True,
                cache=self._cache(encode).to_dict(),
            ) as writer,
            counter("latents", manifest.nsamples) as tick,
        ):
            if resumed:
                print(f"{self.folder}: continuing after {len(writer)} pairs")
            batches = [
                PairsOf(number, tuple(samples[start : start + batch_size]))
                for number in range(len(self.source.paths))
                for samples in [self._left(number, writer, tick)]
                for start in range(0, len(samples), batch_size)
            ]
            before = None
            for batch, found in zip(batches, encode(batches), strict=True):
                if before not in (None, batch.shard):
                    writer.end_shard()
                before = batch.shard
                for one in found:
                    refuse_twice(self._seen, one.key, self.source.paths[batch.shard])
                    self._write(writer, one)
                    tick()
            writer.end_shard()
        return writer.close()

    def _left(self, number: int, writer: ShardWriter, tick: Callable[[], None]) -> list[int]:
        """The samples of a shard that an earlier run did not write."""
        samples = range(self.source.manifest.shardlist[number].nsamples)
        if not len(writer):
            return list(samples)
        left = []
        shard = self.source.open_shard(number)
        try:
            for sample in samples:
                key, _ = shard.read(sample, lambda name: name == "json")
                if key in writer:
                    refuse_twice(self._seen, key, self.source.paths[number])
                    tick()
                else:
                    left.append(sample)
        finally:
            shard.close()
        return left

    def _cache(self, encode: InOrder) -> Cache:
        (latent,) = encode([LatentShape()])
        prompts = self.folder / PROMPTS
        return Cache(
            model=self.settings.model,
            weights=self.settings.weights,
            size=self.settings.size,
            latent=latent,
            flip=self.settings.flip,
            dtype=self.settings.dtype,
            images=self.settings.images,
            text=self.settings.text,
            truncated=len(self.truncated),
            first_truncated=self.truncated[0] if self.truncated else None,
            prompts={"bytes": prompts.stat().st_size, "sha256": file_sha256(prompts)} if self.settings.text else {},
            reference=self.settings.reference,
        )

    def _write(self, writer: ShardWriter, one: Encoded) -> None:
        writer.write_group(one.key, one.metadata, one.images, cached=one.cached)
