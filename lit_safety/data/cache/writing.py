"""The shards of a cache: the latents of each sample's images, in the same shards as in the source.

The shards keep their samples and order, so that training on the cache uses the same pairs in the same order as training
on the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_safety.backbones.backbone import Backbone
from lit_safety.core.chance import fixed_seed
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import file_sha256
from lit_safety.core.progress import counter
from lit_safety.data.cache.cache import PROMPTS, Cache, encode_crops, encode_latents, pixels
from lit_safety.data.cache.prompt_table import PromptTables
from lit_safety.data.cache.reference import FixedDraw, ReferenceCache, encode_reference
from lit_safety.data.format.manifest import JOURNAL, Manifest
from lit_safety.data.format.tar_index import refuse_twice
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.batch import Pair, PairBatch, collate
from lit_safety.data.reading.decode import MASK, PairDecoder, pair_images, pair_metadata
from lit_safety.data.reading.source import Source

#: Threads that decode images while the encoder works.
THREADS = 4


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

    def to_dict(self, source: Source) -> dict[str, Any]:
        """What the manifest states about how the cache was made, and from what."""
        shards = [sha256 for _, sha256 in source.identity()]
        stated = {**asdict(self), "size": list(self.size), "samples": source.manifest.nsamples, "shards": shards}
        if self.reference is None:
            del stated["reference"]
        # Manifests of before these could be set say nothing of them.
        return {k: v for k, v in stated.items() if k not in ("encoder_dtype", "denoiser_dtype") or v != "float32"}


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
        folder: the output folder, which holds `prompts.safetensors` already.
        backbone: the encoders.
        settings: how it is made.
        truncated: prompts that are too long for a text encoder.
        overwrite: delete what an earlier run left there.
        reference: writes the reference cache; None: no reference cache is written.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        backbone: Backbone,
        settings: Settings,
        truncated: list[str],
        overwrite: bool,
        reference: ReferenceWriter | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self.backbone = backbone
        self.settings = settings
        self.truncated = truncated
        self.overwrite = overwrite
        self.reference = reference
        self.decoder = PairDecoder(seed=0, resolution=settings.resolution)
        self.groups = PairDecoder(seed=0, resolution=settings.resolution, whole=True)
        self._seen: dict[str, str] = {}
        """The shard of each key."""

    def write(self, batch_size: int) -> Manifest:
        """Encode everything that an earlier run has not encoded, ``batch_size`` pairs at once.

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
                cache=self._cache().to_dict(),
            ) as writer,
            counter("latents", manifest.nsamples) as tick,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            if resumed:
                print(f"{self.folder}: continuing after {len(writer)} pairs")
            for number in range(len(self.source.paths)):
                for pairs in self._batches(number, batch_size, writer, pool, tick):
                    self._write(writer, pairs)
                writer.end_shard()
        return writer.close()

    def _cache(self) -> Cache:
        height, width = self.settings.size
        try:
            with torch.inference_mode():
                one = self.backbone.posterior(torch.zeros(2, 3, height, width, device=self.backbone.device))
        except RuntimeError as error:
            raise UserError(
                f"the image encoder of {self.settings.model} cannot encode {pixels(self.settings.size)}: "
                f"{str(error).splitlines()[0]}; give another --resolution"
            ) from error
        prompts = self.folder / PROMPTS
        return Cache(
            model=self.settings.model,
            weights=self.settings.weights,
            size=self.settings.size,
            latent=(one.shape[2], one.shape[3], one.shape[4]),
            flip=self.settings.flip,
            dtype=self.settings.dtype,
            images=self.settings.images,
            truncated=len(self.truncated),
            first_truncated=self.truncated[0] if self.truncated else None,
            prompts={"bytes": prompts.stat().st_size, "sha256": file_sha256(prompts)},
            reference=self.settings.reference,
        )

    def _batches(
        self, number: int, batch_size: int, writer: ShardWriter, pool: ThreadPoolExecutor, tick: Any
    ) -> Iterator[list[tuple[Pair, dict[str, bytes]]]]:
        """One shard's samples. The next batch is decoded while one is being encoded."""
        shard = self.source.open_shard(number)
        waiting: list[Any] = []
        try:
            for sample in range(self.source.manifest.shardlist[number].nsamples):
                key, members = shard.read(sample, lambda name: name == MASK or self.decoder.wants(name))
                tick()
                refuse_twice(self._seen, key, shard)
                if key in writer:  # written by the run that this one continues
                    continue
                where = shard.where(sample)
                waiting.append((pool.submit(self._decode, number, sample, key, members, where), members))
                if len(waiting) >= 2 * batch_size:
                    yield [(future.result(), held) for future, held in waiting[:batch_size]]
                    waiting = waiting[batch_size:]
            for start in range(0, len(waiting), batch_size):
                yield [(future.result(), held) for future, held in waiting[start : start + batch_size]]
        finally:
            shard.close()

    def _decode(self, number: int, sample: int, key: str, members: dict[str, bytes], where: str) -> Pair:
        grouped = bool(pair_metadata(members, where).images)
        pair = (self.groups if grouped else self.decoder)(key, members, 0, where)
        # Without this check the cache's manifest would hide a difference.
        self.source.check(number, sample, pair.metadata, where)
        return pair

    def _write(self, writer: ShardWriter, found: list[tuple[Pair, dict[str, bytes]]]) -> None:
        counts = [len(pair.metadata.names) for pair, _ in found]
        images = torch.cat([self._sides(pair) for pair, _ in found]).to(self.backbone.device)
        with torch.inference_mode():
            latents = {False: self.backbone.posterior(images).split(counts)}
            if self.settings.flip:
                latents[True] = self.backbone.posterior(images.flip(-1)).split(counts)
        pairs = [pair for pair, _ in found]
        references = {} if self.reference is None else {
            mirror: self.reference.members(pairs, all_latents, mirror) for mirror, all_latents in latents.items()
        }  # fmt: skip
        for row, (pair, members) in enumerate(found):
            assert pair.crops is not None
            cached = encode_crops(pair.crops)
            for mirror, all_latents in latents.items():
                names = pair.metadata.names
                cached |= encode_latents(all_latents[row], mirror, self.settings.dtype, pair.where, names)
                cached |= references[mirror][row] if references else {}
            kept = [_stored_image(members, name) if self.settings.images else None for name in pair.metadata.names]
            cached |= {MASK: members[MASK]} if MASK in members else {}
            writer.write_group(pair.key, pair.metadata, kept, cached=cached)

    def _sides(self, pair: Pair) -> Tensor:
        """All images of a sample (n, 3, H, W)."""
        sides = pair.images if pair.whole else [pair.chosen, pair.rejected]
        images = [one for one in sides if one is not None] if sides is not None else []
        for side, image in zip(pair.metadata.names, images, strict=True):
            size = (image.shape[-2], image.shape[-1])
            if size != self.settings.size:
                raise UserError(
                    f"{pair.where}: {side} has {pixels(size)}, the first sample {pixels(self.settings.size)}; one "
                    "cache holds one size: give --resolution"
                )
        return torch.stack(images)


def _stored_image(members: dict[str, bytes], side: str) -> bytes:
    return next(data for name, data in members.items() if name.startswith(f"{side}."))


# What `shards precompute` writes about the reference: a few fixed draws of timestep and noise for each pair.


#: A batch, and whether its prompts are dropped -> timesteps (B,), the reference's errors of chosen and rejected (B, 2)
#: (of groups (B, K), of all images) and its predictions on the chosen images (B, C, h, w).
Reference = Callable[[PairBatch, bool], tuple[Tensor, Tensor, Tensor]]


class ReferenceWriter:
    """Run the reference on what a training step will read from the cache: latents and text as they are stored.

    Args:
        reference: the denoiser that a run will use as its reference.
        settings: how many draws, and what is stored of them.
        prompts: the text encoders' outputs, already written.
        dtype: how latents and predictions are stored.
    """

    def __init__(self, reference: Reference, settings: ReferenceCache, prompts: PromptTables, dtype: str) -> None:
        self.reference = reference
        self.settings = settings
        self.prompts = prompts
        self.dtype = dtype

    def members(self, pairs: Sequence[Pair], latents: Sequence[Tensor], mirror: bool) -> list[dict[str, bytes]]:
        """Each sample's members of a shard. Pairs go through the network together, and so do groups.

        Args:
            pairs: decoded, with or without images.
            latents: of each the latents (n, 2, C, h, w) of its n images, unscaled, or those of the mirrored ones.
            mirror: whether these are the mirrored ones.

        Raises:
            UserError: the reference's errors are not finite.
        """
        stored = [one.to(getattr(torch, self.dtype)).float().cpu() for one in latents]
        found: list[list[FixedDraw]] = [[] for _ in pairs]
        for whole in (False, True):
            if not (rows := [row for row, pair in enumerate(pairs) if pair.whole == whole]):
                continue
            alike, own = [pairs[row] for row in rows], [stored[row] for row in rows]
            for number in range(self.settings.draws):
                for row, draw in zip(rows, self._draw(alike, own, number), strict=True):
                    found[row].append(draw)
        return [
            encode_reference(draws, mirror, self.dtype, self._keeps_prediction(pair), pair.where)
            for pair, draws in zip(pairs, found, strict=True)
        ]

    def _draw(self, pairs: Sequence[Pair], latents: Sequence[Tensor], number: int) -> list[FixedDraw]:
        conditions = self.settings.conditions
        drawn = [
            Pair(
                key=pair.key,
                seed=pair.seed,
                metadata=pair.metadata,
                chosen=None,
                rejected=None,
                where=pair.where,
                crops=pair.crops,
                latents=latents[row],
                conditioning=self.prompts.get(pair.metadata.prompt, pair.where),
                draw=FixedDraw(
                    fixed_seed(pair.key, number, self.settings.draws),
                    0.0,
                    torch.zeros(len(pair.metadata.names), conditions),
                ),
                whole=pair.whole,
            )
            for row, pair in enumerate(pairs)
        ]
        batch = collate(drawn, empty=self.prompts.empty())
        runs = [self.reference(batch, without) for without in (False, True)[:conditions]]
        timesteps = runs[0][0].double().tolist()
        errors = torch.stack([run[1].float().cpu() for run in runs], dim=2)
        predictions = torch.stack([run[2].float().cpu() for run in runs], dim=1)
        seeds = batch.noise_seeds
        counts = [len(pair.metadata.names) for pair in pairs]
        return [
            FixedDraw(
                seeds[row],
                timesteps[row],
                errors[row, : counts[row]],
                predictions[row] if self._keeps_prediction(pair) else None,
            )
            for row, pair in enumerate(pairs)
        ]

    def _keeps_prediction(self, pair: Pair) -> bool:
        return self.settings.predictions and pair.metadata.prompt_kind == "clean"
