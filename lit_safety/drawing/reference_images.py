"""Reference images for FID: a folder of image files, or the chosen images of clean pairs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lit_safety.core.errors import UserError
from lit_safety.core.images import FORMATS, decode_image, image_files, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image


class Reference:
    """The images of a set, in a fixed order. `sha256` and `count` are known once all are read.

    Args:
        given: a folder of png, jpg or webp files (its subfolders too), a folder of shards, or a pattern of tar files.
        option: the option it was given by, for messages.
    """

    def __init__(self, given: str, option: str = "--reference") -> None:
        self.given = given
        self.option = option
        self.count = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of the files' bytes, in order."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, Image]]:
        """Name and image, one after another.

        Raises:
            UserError: there is none, or one cannot be read.
        """
        from lit_safety.data.reading.source import tars_in

        folder = Path(self.given)
        shards = not folder.is_dir() or (folder / "manifest.json").is_file() or bool(tars_in(folder))
        for name, content in self._from_shards() if shards else self._from_files(folder):
            self.count += 1
            self._hash.update(content)
            yield name, decode_image(content, name)
        if self.count < 2:
            what = "chosen images of clean pairs" if shards else "png, jpg or webp images"
            raise UserError(f"{self.option} {self.given}: holds only {self.count} {what}; many are needed")

    def _from_files(self, folder: Path) -> Iterator[tuple[str, bytes]]:
        for file in image_files(folder):
            yield str(file), read_bytes(file)

    def _from_shards(self) -> Iterator[tuple[str, bytes]]:
        from lit_safety.data.format.sample import parse_metadata
        from lit_safety.data.reading.source import open_source

        source = open_source(self.given, self.option)
        for number in range(len(source.paths)):
            shard = source.open_shard(number)
            try:
                for number, stored in enumerate(shard.index.samples):
                    where = shard.where(number)
                    metadata = parse_metadata(shard.read_member(number, "json"), where)
                    image = next((name for name in stored.members if name.startswith("chosen.")), None)
                    # a chosen image that is labelled harmful is not an example for a safe model
                    if metadata.prompt_kind != "clean" or metadata.harmful.chosen:
                        continue
                    if image is None or image.split(".", 1)[1] not in FORMATS:
                        raise UserError(
                            f"{where}: lacks its chosen image (perhaps it is cached); give shards with images"
                        )
                    yield f"{where}: chosen", shard.read_member(number, image)
                if shard.problem is not None:
                    raise UserError(f"{source.paths[number]}: {shard.problem}")
            finally:
                shard.close()
