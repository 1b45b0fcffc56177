"""The raw art: icon sets fetched by package name, and every subject in every style as an RGBA image.

The sets come from npm (`@iconify-json/...`), each one JSON file of SVG bodies; `resvg_py` draws them. The project
contains neither of them: they are fetched when the world is built, and the built files name their authors.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.art.subjects import STYLES, SUBJECTS, icon_names

ART_SIDE = 96
"""Side of a stored RGBA image, px."""
_MARGIN = 0.02
"""Empty margin on each side of the icon, as a share of the side."""
_LARGEST = 200 * 2**20
"""The largest accepted JSON of an icon set, in bytes; the largest real one has 60 MB."""


class IconSet(NamedTuple):
    """A package of icons by one design team."""

    package: str
    version: str
    author: str
    license: str


ICON_SETS: dict[str, IconSet] = {
    "twemoji": IconSet("@iconify-json/twemoji", "1.2.5", "Twitter and jdecked", "CC BY 4.0"),
    "noto": IconSet("@iconify-json/noto", "1.2.9", "Google", "Apache 2.0"),
    "fluent-emoji-flat": IconSet("@iconify-json/fluent-emoji-flat", "1.2.6", "Microsoft", "MIT"),
    "fluent-emoji": IconSet("@iconify-json/fluent-emoji", "1.2.7", "Microsoft", "MIT"),
    "emojione": IconSet("@iconify-json/emojione", "1.2.3", "EmojiOne (before version 3)", "CC BY 4.0"),
    "noto-v1": IconSet("@iconify-json/noto-v1", "1.2.5", "Google", "Apache 2.0"),
}


def fetch(work: Path) -> None:
    """Downloads every icon set's package into `work`/packages, unless it exists.

    Raises:
        UserError: npm is missing or cannot get a package.
    """
    target = work / "packages"
    target.mkdir(parents=True, exist_ok=True)
    missing = [one for one in ICON_SETS.values() if not _archive(target, one).is_file()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise UserError("the art world's icons are npm packages, and npm is not installed: install Node.js, or put the "
                        f"packages {', '.join(f'{one.package}@{one.version}' for one in missing)} as npm packs them "
                        f"into {target}")  # fmt: skip
    names = [f"{one.package}@{one.version}" for one in missing]
    done = subprocess.run(["npm", "pack", "--silent", *names], cwd=target, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not all(_archive(target, one).is_file() for one in missing):
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise UserError(f"npm could not get {', '.join(names)}: {said}")


def _archive(folder: Path, icons: IconSet) -> Path:
    return folder / f"{icons.package.removeprefix('@').replace('/', '-')}-{icons.version}.tgz"


def icons_of(work: Path, style: str) -> dict[str, Any]:
    """The icon set's JSON.

    Raises:
        UserError: the package does not hold an icon set.
    """
    file = _archive(work / "packages", ICON_SETS[style])
    try:
        with tarfile.open(file) as archive:
            member = archive.getmember("package/icons.json")
            stream = archive.extractfile(member)
            if stream is None or member.size > _LARGEST:
                raise UserError(f"{file}: package/icons.json is not a file of at most {_LARGEST} bytes; fetch it again")
            return dict(json.loads(stream.read()))
    except (OSError, KeyError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{file} is not an icon set ({error}); delete it and build again") from error


def svg(icons: dict[str, Any], names: tuple[str, ...]) -> str:
    """The SVG text of the first of these icons that the set contains; aliases are followed.

    Raises:
        UserError: the set contains none of them.
    """
    for name in names:
        while name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
        if (icon := icons["icons"].get(name)) is None:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'
    raise UserError(f"the icon set {icons.get('prefix')} has no icon named {' or '.join(names)}")


def rasterise(text: str) -> NDArray[np.uint8]:
    """An icon as (ART_SIDE, ART_SIDE, 4) RGBA, cropped to its visible part and centred.

    Raises:
        UserError: resvg_py is not installed, or the icon is empty.
    """
    from io import BytesIO

    try:
        import resvg_py
    except ImportError as error:
        raise UserError("icons are drawn by resvg_py: pip install 'lit-safety[artworld]'") from error
    drawn = bytes(resvg_py.svg_to_bytes(svg_string=text, width=2 * ART_SIDE, height=2 * ART_SIDE))
    image = Image.open(BytesIO(drawn)).convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise UserError("an icon is empty")
    image = image.crop(box)
    inner = round(ART_SIDE * (1 - 2 * _MARGIN))
    scale = inner / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Colours are multiplied by alpha before scaling, so that transparent pixels do not darken the edge.
    small = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    whole = Image.new("RGBA", (ART_SIDE, ART_SIDE))
    whole.paste(small, ((ART_SIDE - size[0]) // 2, (ART_SIDE - size[1]) // 2))
    return np.asarray(whole, dtype=np.uint8)


def make_art(work: Path) -> None:
    """Writes art.npz into the work folder: one array (subjects, ART_SIDE, ART_SIDE, 4) for each style."""
    fetch(work)
    arrays: dict[str, Any] = {}
    for style in STYLES:
        icons = icons_of(work, style)
        arrays[style] = np.stack([rasterise(svg(icons, icon_names(name))) for name in SUBJECTS])
        print(f"art: {len(SUBJECTS)} subjects in {style}", flush=True)
    unfinished = work / "art.part.npz"
    np.savez(unfinished, **arrays)
    unfinished.rename(work / "art.npz")
