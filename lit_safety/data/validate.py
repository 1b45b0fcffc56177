"""`lit_safety shards validate`: read everything and name every sample that training could not use."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.data.cache.sources import CachedCheck
    from lit_safety.data.format.manifest import Manifest, Shard
    from lit_safety.data.format.sample import PairMetadata


def validate(folder: str, hashes: bool = True) -> None:
    """Read every sample of a folder of shards as training would, and list every problem.

    It checks the manifest; that each shard exists and its size, hash and count; each sample's metadata and images (of
    a cached set: its latents and its prompt's encoding); that chosen and rejected are different images; that all keys
    differ; and that every user has an embedding, if there are embeddings. It exits with status 2 if there is a problem.

    Args:
        folder: A folder of shards, a tar file or a pattern of tar files.
        hashes: Compare each shard's SHA-256 with the manifest's.
    """
    from lit_safety.core.progress import counter
    from lit_safety.data.cache.cache import truncation

    found, samples = 0, 0
    with counter("validate") as count:
        for problem in _steps(folder, hashes):
            if problem is None:
                samples += 1
                count()
            else:
                found += 1
                print(problem)
    if found:
        raise UserError(f"{folder}: {found} problem{'s' if found > 1 else ''}; {samples} pairs are good")
    print(f"{folder}: all {samples} pairs are good")
    if note := truncation(_cache_of(folder)):
        print(f"  {note}")


def problems(folder: str, hashes: bool = True) -> list[str]:
    """Everything that is wrong with a folder of shards, one line each."""
    return [problem for problem in _steps(folder, hashes) if problem is not None]


def _steps(folder: str, hashes: bool) -> Iterator[str | None]:
    """A problem, or None for each good sample."""
    from lit_safety.data.format.manifest import FILE_NAME, load_manifest
    from lit_safety.data.reading.source import is_remote, tars_named
    from lit_safety.users.table import USERS_FILE, Users

    if is_remote(folder):
        raise UserError(f"{folder}: only shards on this machine are validated; copy them first")
    keys: dict[str, str] = {}
    if not os.path.exists(os.path.join(folder, FILE_NAME)):
        for path in tars_named(folder, "folder"):
            yield from _samples(path, None, None, keys)
        return
    manifest = load_manifest(folder)
    if not manifest.shardlist:
        yield f"{os.path.join(folder, FILE_NAME)}: lists no shards; write the shards again"
    users = None
    if (Path(folder) / USERS_FILE).exists():
        try:
            found = Users(folder)
            found.embeddings(found.ids)
            users = frozenset(found.ids)
        except UserError as error:
            yield str(error)
    check = None
    if manifest.cache is not None:
        from lit_safety.data.cache.sources import CachedCheck

        check = CachedCheck(folder, manifest.cache, hashes)
        yield from check.problems()
    for shard in manifest.shardlist:
        path = str(Path(folder) / shard.url)
        problem = _file_problem(path, shard, hashes)
        if problem is not None:
            yield problem
        if os.path.exists(path):
            yield from _samples(path, shard, manifest, keys, check, users)


def _cache_of(folder: str) -> dict[str, Any]:
    from lit_safety.data.format.manifest import FILE_NAME, load_manifest

    return (load_manifest(folder).cache or {}) if os.path.exists(os.path.join(folder, FILE_NAME)) else {}


def _file_problem(path: str, shard: Shard, hashes: bool) -> str | None:
    from lit_safety.core.hashes import file_sha256

    if not os.path.exists(path):
        return f"{path}: is missing"
    size = os.path.getsize(path)
    if shard.bytes is not None and size != shard.bytes:
        return f"{path}: has {size} bytes but the manifest says {shard.bytes}"
    if hashes and shard.sha256 is not None and file_sha256(path) != shard.sha256:
        return f"{path}: is not the file the manifest was made with (its SHA-256 differs)"
    return None


def _samples(
    path: str,
    shard: Shard | None,
    manifest: Manifest | None,
    keys: dict[str, str],
    check: CachedCheck | None = None,
    users: frozenset[str] | None = None,
) -> Iterator[str | None]:
    from lit_safety.core.images import same_image
    from lit_safety.data.format.manifest import SampleClass
    from lit_safety.data.format.tar_index import OpenShard
    from lit_safety.data.reading.decode import MASK, pair_metadata, sample_images
    from lit_safety.users.table import USERS_FILE

    try:
        tar = OpenShard(path)
    except UserError as error:
        yield str(error)
        return
    try:
        if tar.problem is not None:
            yield f"{path}: {tar.problem}"
        total = len(tar.index.samples)
        if total == 0 and tar.problem is None:
            yield f"{path}: holds 0 samples; restore it or remove it"
        if shard is not None and total != shard.nsamples:
            yield f"{path}: holds {total} samples but the manifest says {shard.nsamples}"
        for number in range(total):
            try:
                key, members = tar.read(number)
                metadata = pair_metadata(members, tar.where(number))
                if check is not None:
                    check.sample(members, metadata, tar.where(number))
                if MASK in members:
                    _check_mask(members, metadata, tar.where(number))
                same: Callable[[Any, Any], bool] = operator.eq
                if check is None or check.images:
                    images: list[Any] = sample_images(members, tar.where(number))[1]
                    same = same_image
                else:
                    images = [members.get(f"{name}.latent.npy") for name in metadata.names]
                for (name, one), (other, its) in combinations(zip(metadata.names, images, strict=True), 2):
                    if same(one, its):
                        raise UserError(f"{tar.where(number)}: {name} and {other} are the same image")
            except UserError as error:
                yield str(error)
                continue
            if (other := keys.setdefault(key, path)) != path:
                yield f"{tar.where(number)}: its key is also in {other}, so both would make the same random choices"
            elif users is not None and metadata.user_id is not None and metadata.user_id not in users:
                yield f"{tar.where(number)}: its user {metadata.user_id!r} is not in {USERS_FILE} next to the shards"
            elif (
                shard is not None
                and manifest is not None
                and (difference := manifest.difference(shard, number, SampleClass.of(metadata)))
            ):
                yield f"{tar.where(number)}: is {SampleClass.of(metadata)} but {difference}"
            else:
                yield None
    finally:
        tar.close()


def _check_mask(members: dict[str, bytes], metadata: PairMetadata, where: str) -> None:
    """Whether a sample's mask is of the size of its images, where these are there, and white somewhere."""
    import torch

    from lit_safety.core.images import decode_image
    from lit_safety.data.reading.decode import MASK, crop_of, sample_images
    from lit_safety.data.reading.masks import read_mask

    if metadata.images:
        raise UserError(f"{where}: {MASK} is of a pair, and this is a group")
    images = [decode_image(members[MASK], f"{where}: {MASK}")] * 2
    if not any(name.endswith(".latent.npy") for name in members):
        images = sample_images(members, where)[1]
    sizes = torch.tensor([crop_of((image.height, image.width), None) for image in images])
    read_mask(members[MASK], sizes, False, f"{where}: {MASK}")
