"""`lit_safety shards inspect`: what a folder of shards holds, in words and as an image."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from lit_safety.data.format.sample import PairMetadata
    from lit_safety.data.reading.source import Source


if TYPE_CHECKING:  # the command line needs this module's signature and must not wait for torch
    #: Key, metadata, and the images. A cached sample may have no images.
    Row = tuple[str, PairMetadata, Image.Image | None, Image.Image | None]

CELL = 128
"""Side of an image on the sheet in pixels."""


def inspect(folder: str, samples: int = 4, sheet: str | None = None, show_harmful: bool = False) -> None:
    """Print what a folder of shards holds: counts by category, kind, order and label, sizes and a few samples.

    Args:
        folder: A folder of shards, a tar file or a pattern of tar files.
        samples: How many samples to show. They are chosen at random, the same ones each time.
        sheet: Draw the shown samples into this PNG file: chosen, rejected and what is known about them.
        show_harmful: Do not blur images in the PNG that are labelled harmful or not labelled.
    """
    from lit_safety.data.reading.source import open_source

    source = open_source(folder, "folder")
    for line in _summary(source):
        print(line)
    rows = []
    for key, metadata, chosen, rejected in _drawn(source, samples):
        print(f"\n{key}: {metadata.prompt}")
        images = [f"{one.width} x {one.height}" for one in (chosen, rejected) if one is not None]
        print(f"  {_words(metadata)}; {', '.join(images) + ' pixels' if images else 'latents only'}")
        rows.append((key, metadata, chosen, rejected))
    if sheet is not None:
        draw_sheet(rows, sheet, show_harmful)
        print(f"\ndrawn: {sheet}")


def _summary(source: Source) -> list[str]:
    manifest = source.manifest
    counts = manifest.counts()
    sizes = [shard.bytes for shard in manifest.shardlist if shard.bytes is not None]
    lines = [
        f"{source.given}: {counts['samples']} pairs in {len(manifest.shardlist)} shards, {sum(sizes) / 1e6:.1f} MB",
    ]
    for name in ("category", "kind", "order", "label", "images"):
        if name not in counts:
            continue
        held = ", ".join(f"{value} {number}" for value, number in counts[name].items())
        lines.append(f"  {name + ':':<12}{held or 'not known'}")
    per_shard = Counter(shard.nsamples for shard in manifest.shardlist)
    lines.append(f"  {'per shard:':<12}{min(per_shard)} to {max(per_shard)} pairs")
    for name, held_there in (("provenance", manifest.provenance), ("seeds", manifest.seeds)):
        if held_there:
            lines.append(f"  {name + ':':<12}{held_there}")
    return lines + [line for one in source.caches if one.cache for line in _cached(one.given, one.cache)]


def _cached(given: str, stated: dict[str, Any]) -> list[str]:
    from lit_safety.data.cache.cache import parse_cache, truncation
    from lit_safety.data.format.manifest import FILE_NAME

    cache = parse_cache(stated, f"{given}/{FILE_NAME}: cache")
    kept = f"{'with' if cache.images else 'without'} images, {'with' if cache.flip else 'without'} mirrored latents"
    lines = [f"  {'cached:':<12}by {cache}, latents {' x '.join(map(str, cache.latent))} in {cache.dtype}, {kept}"]
    if (reference := cache.reference) is not None:
        more = ", and without the prompt" * reference.empty + ", and predictions for the anchor" * reference.predictions
        lines.append(f"  {'':<12}reference: {reference.draws} draws a pair in {reference.precision}{more}")
    note = truncation(stated)
    return lines if note is None else [*lines, f"  {'':<12}{note}"]


def _words(metadata: PairMetadata) -> str:
    chosen, rejected = metadata.label.split(">")
    about = ", ".join(metadata.categories) or "no category"
    concept = f" ({metadata.concept})" if metadata.concept else ""
    user = f", user {metadata.user_id}" if metadata.user_id else ""
    of = f"; best and worst of {count}" if (count := len(metadata.images)) else ""
    return f"{metadata.prompt_kind} prompt, {about}{concept}, {chosen} over {rejected} by {metadata.order}{user}{of}"


def _drawn(source: Source, samples: int) -> list[Row]:
    from lit_safety.data.cache.cache import has_latents_only
    from lit_safety.data.reading.decode import pair_images, pair_metadata
    from lit_safety.data.reading.order import EpochOrder

    order = EpochOrder([shard.nsamples for shard in source.manifest.shardlist], seed=None, window=1)
    found: list[Row] = []
    # At random and not every n-th, because generated data is often periodic. The same ones each time.
    for position in sorted(random.Random(0).sample(range(order.total), min(max(samples, 0), order.total))):
        window = order.window_at(position)
        (index,) = window.shards
        shard = source.open_shard(index)
        try:
            number = position - window.start
            key, members = shard.read(number)
            if has_latents_only(members):
                found.append((key, pair_metadata(members, shard.where(number)), None, None))
            else:
                found.append((key, *pair_images(members, shard.where(number))))
        finally:
            shard.close()
    return found


def draw_sheet(rows: list[Row], path: str, show_harmful: bool = False) -> None:
    """Draw one row a sample into a PNG file: chosen, rejected, and what is known about them.

    Args:
        rows: key, metadata, chosen and rejected of each sample.
        path: the PNG file; written whole or not at all.
        show_harmful: False blurs what is labelled harmful or not labelled.
    """
    import io
    from pathlib import Path

    from lit_safety.core.files import write_atomic
    from lit_safety.report.sheet import Band, Cell, Row, fit, veiled
    from lit_safety.report.sheet import sheet as labelled

    lines = []
    for key, metadata, chosen, rejected in rows:
        cells = []
        for image, label in ((chosen, metadata.harmful.chosen), (rejected, metadata.harmful.rejected)):
            if image is None:
                cells.append(Cell(None, note="latents only"))
                continue
            shown = fit(image, CELL)
            cells.append(Cell(shown if label is False or show_harmful else veiled(shown)))
        words = [_cut(metadata.prompt, 120), _words(metadata)]
        lines.append(Row(_cut(key, 40), cells, "\n".join(words)))
    buffer = io.BytesIO()
    labelled([Band([("chosen", ""), ("rejected", "")], lines)], CELL).save(buffer, "PNG")
    write_atomic(Path(path), buffer.getvalue())


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
