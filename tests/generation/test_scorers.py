from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.generation.pairs import ClipScorer
from tests.helpers.documents import TOYWORLD

CLIP = TOYWORLD / "clip"


def test_clip_scores_each_image_against_its_own_prompt() -> None:
    scorer = ClipScorer(str(CLIP))
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    prompts = ["a red ball on the beach", "a gun in the park"]
    both = scorer(images, prompts)
    assert both == pytest.approx([scorer([image], [p])[0] for image, p in zip(images, prompts, strict=True)], abs=1e-3)
    assert both != pytest.approx(scorer(images, prompts[::-1]), abs=1e-3)
    assert all(-100 <= score <= 100 for score in both)
    assert scorer.settings["scorer"] == "CLIPScore"
    assert len(scorer.settings["sha256"]) == 64


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--scorer\.init_args\.clip .*: lacks config\.json"):
        ClipScorer(str(tmp_path))
