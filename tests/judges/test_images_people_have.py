"""Judges, scorers, features, reference sets and edits see an image as the data module does: turned, over white."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lit_safety.core.errors import UserError
from lit_safety.core.images import rgb
from lit_safety.drawing.edits import Edit, read_images
from lit_safety.drawing.gallery import Drawn
from lit_safety.drawing.reference_images import Reference
from lit_safety.judges.clip import Clip
from lit_safety.judges.cost import CostJudge
from lit_safety.judges.fid import extract
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.judging import open_drawn
from lit_safety.judges.toy.judge import ToyWorldJudge
from lit_safety.judges.vlm import VisionChat
from tests.helpers.documents import TOYWORLD


def scene(side: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[: side // 2] //= 3
    return Image.fromarray(pixels)


def turned() -> Image.Image:
    """As a camera stores it, opened but not turned."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    scene().transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    return Image.open(buffer)


def see_through(mode: str) -> Image.Image:
    image = scene().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def grey_16() -> Image.Image:
    return Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257)


GIVEN = {"turned": turned, "RGBA": lambda: see_through("RGBA"), "LA": lambda: see_through("LA"), "I;16": grey_16}


@pytest.fixture(scope="module")
def lookers(clip_folder: Path):
    """All that is given PIL images: name -> what it makes of one, as numbers."""
    toy, clip, cost = (
        ToyWorldJudge(TOYWORLD / "judge"),
        Clip(str(clip_folder), "--clip"),
        CostJudge(TOYWORLD / "cost_model"),
    )
    chat = VisionChat("http://localhost:9/v1", "none", "NO_KEY", 1.0, 0, 1, 512, 1)

    def sent(image: Image.Image) -> list[float]:
        uri = chat._part(image)["image_url"]["url"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).flatten().tolist()

    return {
        "toy judge": lambda image: list(toy.judge([image])[0].scores.values()),
        "cost model": lambda image: cost.scorer.costs([image]).tolist(),
        "clip": lambda image: clip.images([image])[0].tolist(),
        "features": lambda image: extract(torch.nn.Flatten(), [("one", image)])[0].tolist(),
        "vision model": sent,
    }


@pytest.mark.parametrize("given", GIVEN)
def test_everyone_sees_the_same_image(lookers, given: str) -> None:
    image = GIVEN[given]()
    wanted = rgb(image)
    if given == "turned":
        assert np.array_equal(np.asarray(wanted), np.asarray(scene()))
    for name, look in lookers.items():
        assert look(GIVEN[given]()) == look(wanted), name
        assert look(wanted) != look(Image.new("RGB", (32, 32), "white")), f"{name}: the two are told apart at all"


def saved(folder: Path) -> Path:
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 8
    wide = scene(48).crop((0, 0, 48, 32))
    wide.transpose(Image.Transpose.ROTATE_270).save(folder / "a.png", exif=exif)
    see_through("RGBA").save(folder / "b.png")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "._shards.tar").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


def test_a_reference_folder_is_read_as_it_is_seen(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set")
    wide = scene(48).crop((0, 0, 48, 32))
    found = [np.asarray(image) for _, image in Reference(str(folder))]
    assert np.array_equal(found[0], np.asarray(wide))
    assert np.array_equal(found[1], np.asarray(rgb(see_through("RGBA"))))
    assert len(found) == 2
    shutil.copy(folder / "a.png", folder / "c.tif")
    with pytest.raises(UserError, match=r"c\.tif"):
        list(Reference(str(folder)))


def test_edits_begin_from_the_upright_image(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set")
    (wide, _), _ = read_images(str(folder))
    assert wide.size == (48, 32)
    edit = Edit("image_to_image", str(folder), 0.5, "all")

    class Asked:
        prompt, seed = "a", 0

    (given,) = edit.inputs(None, [Asked()], 16)["image"]
    expected = [ImageOps.fit(one, (16, 16), Image.Resampling.LANCZOS) for one in read_images(str(folder))[0]]
    assert any(np.array_equal(np.asarray(given), np.asarray(one)) for one in expected)


def test_a_drawing_that_somebody_turned_is_judged_upright(tmp_path: Path) -> None:
    saved(tmp_path / "set")
    found = open_drawn(Drawn(tmp_path / "set" / "a.png"))
    assert not isinstance(found, JudgeError)
    assert found.size == (48, 32)
    assert isinstance(open_drawn(Drawn(tmp_path / "set" / "._a.png")), JudgeError)
    assert isinstance(open_drawn(Drawn(tmp_path / "set" / "none.png")), JudgeError)
