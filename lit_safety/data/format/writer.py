"""Write preference pairs into shards with a manifest next to them.

    with ShardWriter("shards/train", provenance={"source": "my set"}) as writer:
        writer.write("000001", {"prompt": "a cat", ...}, chosen=image, rejected=other)

A shard gets its name only when it is whole, and the manifest is written last. So a reader never mistakes what a
killed run left for data: a folder with a journal but without a manifest is not complete. One writer at a time holds a
folder's lock. The bytes of the shards depend only on the samples: two runs write equal files.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_file, take_lock
from lit_safety.core.hashes import file_sha256
from lit_safety.core.images import extension_of, rgb
from lit_safety.data.format.manifest import (
    FILE_NAME,
    JOURNAL,
    Manifest,
    SampleClass,
    Shard,
    load_manifest,
    save_manifest,
)
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from lit_safety.data.format.tar_index import INDEX, index_tar, save_index

if TYPE_CHECKING:
    import webdataset as wds

# webdataset cuts a member's name at the first dot and skips names that begin with two underscores.
_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]{1,200}\Z")
_ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


class ShardWriter:
    """Write pairs into `folder/NAME-000000.tar`, ... and `folder/manifest.json`.

    Args:
        folder: the folder of the shards; made if missing. If it holds shards of an earlier run, that is an error
            without `overwrite`.
        samples_per_shard: how many samples a shard holds at most. With several small shards several workers can read at
            once, and the order mixes whole windows of shards; a few hundred is a good size.
        name: the shards' prefix.
        image_format: how PIL images are stored: `png` or `webp` (both lossless) or `jpg`. Bytes are stored unchanged.
        provenance: where the samples come from, for the manifest.
        seeds: the seeds they were drawn with, for the manifest.
        overwrite: replace the shards that an earlier run left in the folder.
        resume: continue a stopped run with the same settings: its finished shards are kept, and `key in writer` says
            which samples they hold. The caller writes the others in the same order as before.
        cache: for cached latents, what the manifest states about the model that made them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        samples_per_shard: int = 256,
        name: str = "shard",
        image_format: str = "png",
        provenance: Mapping[str, Any] | None = None,
        seeds: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        if image_format not in _ENCODERS:
            raise UserError(f"image_format must be one of {', '.join(_ENCODERS)}, not {image_format!r}")
        if not _KEY.match(name):
            raise UserError(f"the shards' name {name!r} may hold only letters, digits, dashes and underscores")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.name = name
        self.image_format = image_format
        self.provenance = dict(provenance or {})
        self.seeds = dict(seeds or {})
        self.cache = None if cache is None else dict(cache)
        self.manifest: Manifest | None = None
        """Set when the writer is closed."""
        self._shards: list[Shard] = []
        self._classes: dict[SampleClass, int] = {}
        self._labels: Counter[str] = Counter()
        self._keys: set[str] = set()
        self._open: contextlib.ExitStack | None = None
        self._tar: wds.TarWriter | None = None
        self._in_shard: list[int] = []
        self._lock = take_lock(self.folder)
        if not (resume and not overwrite and self._take_up()):
            self._clear(overwrite)
            self._save_journal()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        """Samples written so far, including those of the run that is resumed."""
        return len(self._keys)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.close()
            elif self._open is not None:
                # Hand the exception to the atomic file, which removes the unfinished shard.
                self._open.__exit__(kind, error, trace)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def write(
        self,
        key: str,
        metadata: PairMetadata | Mapping[str, Any],
        chosen: Image.Image | bytes | None,
        rejected: Image.Image | bytes | None,
        *,
        cached: Mapping[str, bytes] | None = None,
        mask: Image.Image | bytes | None = None,
    ) -> None:
        """Append one pair.

        Args:
            key: names the sample and seeds its random choices; unique; letters, digits, dashes and underscores.
            metadata: the pair's metadata, checked here.
            chosen: the preferred image, or the bytes of a PNG, JPEG or WebP file; None only if it is cached.
            rejected: the other one.
            cached: members of a cache by suffix, such as `chosen.latent.npy`.
            mask: white where the two images differ, of their size; the bytes of a PNG, or an image.

        Raises:
            UserError: the key is used already or not plain, the metadata is not valid, or the bytes are not such an
                image.
        """
        self._append(key, metadata, (chosen, rejected), cached, mask)

    def write_group(
        self,
        key: str,
        metadata: PairMetadata | Mapping[str, Any],
        images: Sequence[Image.Image | bytes | None],
        *,
        cached: Mapping[str, bytes] | None = None,
    ) -> None:
        """Append one group: as `write`, with an image for each of the metadata's `images`.

        Raises:
            UserError: as `write`, or the number of images is another one.
        """
        self._append(key, metadata, images, cached)

    def _append(
        self,
        key: str,
        metadata: PairMetadata | Mapping[str, Any],
        images: Sequence[Image.Image | bytes | None],
        cached: Mapping[str, bytes] | None,
        mask: Image.Image | bytes | None = None,
    ) -> None:
        where = f"{self.folder}: sample {key!r}"
        if not isinstance(key, str) or not _KEY.match(key):
            raise UserError(f"{where}: a key may hold only letters, digits, dashes and underscores")
        if key in self._keys:
            raise UserError(f"{where}: the key is used twice")
        pair = parse_metadata(metadata.to_dict() if isinstance(metadata, PairMetadata) else metadata, where)
        if len(images) != len(pair.names):
            raise UserError(f"{where}: has {len(images)} images, and its metadata says {len(pair.names)}")
        members: dict[str, bytes | str] = {"__key__": key, "json": pair.to_json()}
        for name, image in zip(pair.names, images, strict=True):
            if image is None:
                if not cached:
                    raise UserError(f"{where}: lacks its {name} image")
                continue
            data = self._encode(image)
            members[f"{name}.{extension_of(data, f'{where}: {name}')}"] = data
        if mask is not None:
            data = mask if isinstance(mask, bytes) else _png(mask.convert("L"))
            if extension_of(data, f"{where}: mask") != "png":
                raise UserError(f"{where}: mask is no PNG")
            members["mask.png"] = data
        self._tar_writer().write({**members, **(cached or {})})
        self._keys.add(key)
        self._labels[pair.label] += 1
        self._in_shard.append(self._classes.setdefault(SampleClass.of(pair), len(self._classes)))
        if len(self._in_shard) >= self.samples_per_shard:
            self.end_shard()

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest."""
        if self.manifest is not None:
            return self.manifest
        if self._in_shard:
            self.end_shard()
        if not self._shards:
            (self.folder / JOURNAL).unlink(missing_ok=True)
            raise UserError(f"{self.folder}: 0 samples were written, so a manifest cannot be written")
        self.manifest = self._manifest()
        save_manifest(self.manifest, self.folder)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        self._release()
        return self.manifest

    def _save_journal(self) -> None:
        save_manifest(self._manifest(), self.folder, JOURNAL)

    def _manifest(self) -> Manifest:
        return Manifest(
            shardlist=tuple(self._shards),
            classes=tuple(self._classes),
            labels=dict(self._labels),
            provenance=self.provenance,
            seeds=self.seeds,
            cache=self.cache,
        )

    def _take_up(self) -> bool:
        """Continue from what a stopped run left; False if there is nothing."""
        if (self.folder / FILE_NAME).exists() or not (self.folder / JOURNAL).exists():
            return False
        left = load_manifest(self.folder, JOURNAL)
        if not left.shardlist:  # it had not finished a shard; the files there are ours
            self._clear(overwrite=True)
            return False
        if (left.provenance, left.seeds, left.cache) != (self.provenance, self.seeds, self.cache):
            raise UserError(
                f"{self.folder}: holds a stopped run with other settings; give the same settings, name another folder "
                "or ask to overwrite"
            )
        for shard in left.shardlist:
            path = self.folder / shard.url
            if not path.exists() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path}: is missing, or was changed since the run was stopped; ask to overwrite")
            self._keys.update(sample.key for sample in index_tar(path).samples)
        self._shards = list(left.shardlist)
        self._classes = {one: number for number, one in enumerate(left.classes)}
        self._labels = Counter(left.labels)
        return True

    def _clear(self, overwrite: bool) -> None:
        old = [self.folder / FILE_NAME, self.folder / JOURNAL, *self.folder.glob(f"{self.name}-??????.tar")]
        old += self.folder.glob(f"{self.name}-??????.tar{INDEX}")
        old = [path for path in old if path.exists()]
        if old and not overwrite:
            raise UserError(f"{self.folder}: already holds {old[0].name}; name another folder or ask to overwrite")
        for path in old:  # the manifest first: without it the rest does not count as a data set
            path.unlink()

    def _shard_path(self) -> Path:
        return self.folder / f"{self.name}-{len(self._shards):06d}.tar"

    def _tar_writer(self) -> wds.TarWriter:
        if self._tar is None:
            import webdataset as wds  # brings torch, for which no help should wait

            self._open = contextlib.ExitStack()
            file: BinaryIO = self._open.enter_context(atomic_file(self._shard_path()))
            # encoder=False: bytes only. A fixed time and owner make equal samples give equal files.
            self._tar = wds.TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644)
            self._open.callback(self._tar.close)
        return self._tar

    def end_shard(self) -> None:
        """Finish the shard that is being written; the next sample begins another."""
        if self._open is None:
            return
        path = self._shard_path()
        self._open.close()
        self._open = self._tar = None
        save_index(path)
        shard = Shard(path.name, len(self._in_shard), path.stat().st_size, file_sha256(path), tuple(self._in_shard))
        self._shards.append(shard)
        self._in_shard = []
        self._save_journal()

    def _encode(self, image: Image.Image | bytes) -> bytes:
        if isinstance(image, bytes):
            return image
        buffer = io.BytesIO()
        rgb(image).save(buffer, **_ENCODERS[self.image_format])
        return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
