"""What `shards precompute` computes: text encoders' outputs, latents and reference errors, batch after batch.

A batch goes through three stages (`core.stages`): images are decoded in threads, the device computes, and the results,
which are copied while the device works on the next batch, become members of a shard. The processor waits for the device
once a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_safety.backbones.backbone import Backbone, encode_alike
from lit_safety.core.chance import fixed_seed
from lit_safety.core.errors import UserError
from lit_safety.core.stages import on_the_way
from lit_safety.data.cache.cache import encode_crops, encode_latents, pixels
from lit_safety.data.cache.prompt_table import PromptTables
from lit_safety.data.cache.reference import FixedDraw, ReferenceCache, encode_reference
from lit_safety.data.format.sample import PairMetadata
from lit_safety.data.format.tar_index import OpenShard
from lit_safety.data.reading.batch import Pair, PairBatch, collate, to_floats
from lit_safety.data.reading.decode import MASK, PairDecoder, pair_metadata
from lit_safety.data.reading.source import Source

#: Threads that read and decode images while the encoder works.
THREADS = 4


# Tasks, and their results.


@dataclass(frozen=True)
class Texts:
    """Prompts to encode. The result: outputs by name, arrays of as many rows, in the type in which they are stored."""

    prompts: tuple[str, ...]


@dataclass(frozen=True)
class LatentShape:
    """The result: (C, h, w) of an image's latents."""


@dataclass(frozen=True)
class PairsOf:
    """Samples of one shard, which are encoded together. The result: an `Encoded` of each."""

    shard: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """A sample of the cache."""

    key: str
    metadata: PairMetadata
    images: list[bytes | None]
    """Its images, where they are kept."""
    cached: dict[str, bytes]
    """Members of its shard by suffix."""


@dataclass(frozen=True)
class How:
    """What decides the numbers, next to the model."""

    model: str
    """The model's name, for messages."""
    size: tuple[int, int]
    """Height and width in pixels at which images are encoded."""
    resolution: int | None
    flip: bool
    """Also encode the mirrored images."""
    dtype: str
    """The type in which latents and text are stored."""
    images: bool
    """Keep the images."""
    image_encoder_dtype: str = "float32"
    """bfloat16: the image encoder runs under autocast."""


class Encoder:
    """The stages of a cache's numbers.

    Args:
        source: the shards with images.
        backbone: the encoders, on their device.
        how: what decides the numbers.
        reference: makes what writes the reference cache, once the text is written; None: there is none.
    """

    def __init__(
        self, source: Source, backbone: Backbone, how: How, reference: Callable[[], ReferenceWriter] | None = None
    ) -> None:
        self.source = source
        self.backbone = backbone
        self.how = how
        self._make_reference = reference
        self._stored = getattr(torch, how.dtype)
        self._decoder = PairDecoder(seed=0, resolution=how.resolution)
        self._groups = PairDecoder(seed=0, resolution=how.resolution, whole=True)
        self._pool = ThreadPoolExecutor(THREADS)
        self._shard: tuple[int, OpenShard] | None = None

    @cached_property
    def _reference(self) -> ReferenceWriter | None:
        return None if self._make_reference is None else self._make_reference()

    def start(self, task: Texts | LatentShape | PairsOf) -> Any:
        """Begin to decode a batch of samples. Other tasks have nothing to decode.

        Raises:
            UserError: a sample cannot be read.
        """
        if not isinstance(task, PairsOf):
            return task
        shard = self._open(task.shard)
        futures = []
        for sample in task.samples:
            key, members = shard.read(sample, lambda name: name == MASK or self._decoder.wants(name))
            arguments = (task.shard, sample, key, members, shard.where(sample))
            futures.append((self._pool.submit(self._decode, *arguments), members))
        return futures

    def run(self, started: Any) -> Callable[[], Any]:
        """Encode a batch.

        Raises:
            UserError: an image cannot be used, or the image encoder does not take images of this size.
        """
        with torch.inference_mode():
            if isinstance(started, Texts):
                return self._texts(started.prompts)
            if isinstance(started, LatentShape):
                return self._shape()
            return self._pairs(started)

    def close(self) -> None:
        """End its threads, and close the shard that is open."""
        self._pool.shutdown(cancel_futures=True)
        if self._shard is not None:
            self._shard[1].close()

    def _open(self, number: int) -> OpenShard:
        if self._shard is None or self._shard[0] != number:
            if self._shard is not None:
                self._shard[1].close()
            self._shard = number, self.source.open_shard(number)
        return self._shard[1]

    def _texts(self, prompts: Sequence[str]) -> Callable[[], dict[str, NDArray[Any]]]:
        rows = encode_alike(self.backbone, prompts)
        wait = on_the_way({name: one.to(self._stored) for name, one in rows.items()})
        return lambda: {name: one.numpy() for name, one in wait().items()}

    def _shape(self) -> Callable[[], tuple[int, int, int]]:
        height, width = self.how.size
        try:
            one = self._posterior(torch.zeros(2, 3, height, width, device=self.backbone.device))
        except RuntimeError as error:
            raise UserError(
                f"the image encoder of {self.how.model} cannot encode {pixels(self.how.size)}: "
                f"{str(error).splitlines()[0]}; give another --resolution"
            ) from error
        shape = (one.shape[2], one.shape[3], one.shape[4])
        return lambda: shape

    def _posterior(self, images: Tensor) -> Tensor:
        half = self.how.image_encoder_dtype != "float32"
        with torch.autocast(images.device.type, getattr(torch, self.how.image_encoder_dtype), enabled=half):
            return self.backbone.posterior(images)

    def _decode(self, number: int, sample: int, key: str, members: dict[str, bytes], where: str) -> Pair:
        grouped = bool(pair_metadata(members, where).images)
        pair = (self._groups if grouped else self._decoder)(key, members, 0, where)
        # Without this check the cache's manifest would hide a difference.
        self.source.check(number, sample, pair.metadata, where)
        return pair

    def _pairs(self, futures: Sequence[tuple[Future[Pair], dict[str, bytes]]]) -> Callable[[], list[Encoded]]:
        found = [(future.result(), members) for future, members in futures]
        pairs = [pair for pair, _ in found]
        counts = [len(pair.metadata.names) for pair in pairs]
        images = torch.cat([self._sides(pair) for pair in pairs])
        if self.backbone.device.type == "cuda":
            images = images.pin_memory().to(self.backbone.device, non_blocking=True)
        else:
            images = images.to(self.backbone.device)
        images = to_floats(images)
        mirrors = (False, True) if self.how.flip else (False,)
        latents = {mirror: self._posterior(images.flip(-1) if mirror else images) for mirror in mirrors}
        waits = {
            mirror: on_the_way({"stored": one.to(self._stored), "finite": torch.isfinite(one).flatten(1).all(1)})
            for mirror, one in latents.items()
        }
        reference = self._reference
        references = {} if reference is None else {
            mirror: reference.members(pairs, wait()["stored"].split(counts), mirror) for mirror, wait in waits.items()
        }  # fmt: skip

        def finish() -> list[Encoded]:
            done = []
            stored = {mirror: wait() for mirror, wait in waits.items()}
            parts = {mirror: one["stored"].split(counts) for mirror, one in stored.items()}
            finite = {mirror: one["finite"].split(counts) for mirror, one in stored.items()}
            about = {mirror: members() for mirror, members in references.items()}
            for row, (pair, members) in enumerate(found):
                assert pair.crops is not None
                names = pair.metadata.names
                cached = encode_crops(pair.crops)
                for mirror in mirrors:
                    cached |= encode_latents(
                        parts[mirror][row], finite[mirror][row].tolist(), mirror, pair.where, names
                    )
                    cached |= about[mirror][row] if about else {}
                kept = [_stored_image(members, name) if self.how.images else None for name in names]
                cached |= {MASK: members[MASK]} if MASK in members else {}
                done.append(Encoded(pair.key, pair.metadata, kept, cached))
            return done

        return finish

    def _sides(self, pair: Pair) -> Tensor:
        """All images of a sample, uint8 (n, 3, H, W)."""
        sides = pair.images if pair.whole else [pair.chosen, pair.rejected]
        images = [one for one in sides if one is not None] if sides is not None else []
        for side, image in zip(pair.metadata.names, images, strict=True):
            size = (image.shape[-2], image.shape[-1])
            if size != self.how.size:
                raise UserError(
                    f"{pair.where}: {side} has {pixels(size)}, the first sample {pixels(self.how.size)}; one "
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

    def members(
        self, pairs: Sequence[Pair], latents: Sequence[Tensor], mirror: bool
    ) -> Callable[[], list[dict[str, bytes]]]:
        """Each sample's members of a shard; the function that this returns waits for them.

        Pairs go through the network together, and so do groups.

        Args:
            pairs: decoded, with or without images.
            latents: of each the latents (n, 2, C, h, w) of its n images, unscaled, or those of the mirrored ones, on
                the CPU, in the type in which they are stored.
            mirror: whether these are the mirrored ones.

        Raises:
            UserError: the reference's errors are not finite.
        """
        stored = [one.float() for one in latents]
        drawn: list[tuple[list[int], Callable[[], list[FixedDraw]]]] = []
        for whole in (False, True):
            if not (rows := [row for row, pair in enumerate(pairs) if pair.whole == whole]):
                continue
            alike, own = [pairs[row] for row in rows], [stored[row] for row in rows]
            drawn += [(rows, self._draw(alike, own, number)) for number in range(self.settings.draws)]

        def finish() -> list[dict[str, bytes]]:
            found: list[list[FixedDraw]] = [[] for _ in pairs]
            for rows, draws in drawn:
                for row, draw in zip(rows, draws(), strict=True):
                    found[row].append(draw)
            return [
                encode_reference(draws, mirror, self.dtype, self._keeps_prediction(pair), pair.where)
                for pair, draws in zip(pairs, found, strict=True)
            ]

        return finish

    def _draw(self, pairs: Sequence[Pair], latents: Sequence[Tensor], number: int) -> Callable[[], list[FixedDraw]]:
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
        wait = on_the_way(
            {
                "timesteps": runs[0][0],
                "errors": torch.stack([run[1].float() for run in runs], dim=2),
                "predictions": torch.stack([run[2].float() for run in runs], dim=1),
            }
        )
        seeds = batch.noise_seeds
        counts = [len(pair.metadata.names) for pair in pairs]

        def finish() -> list[FixedDraw]:
            found = wait()
            timesteps = found["timesteps"].double().tolist()
            return [
                FixedDraw(
                    seeds[row],
                    timesteps[row],
                    found["errors"][row, : counts[row]],
                    found["predictions"][row] if self._keeps_prediction(pair) else None,
                )
                for row, pair in enumerate(pairs)
            ]

        return finish

    def _keeps_prediction(self, pair: Pair) -> bool:
        return self.settings.predictions and pair.metadata.prompt_kind == "clean"
