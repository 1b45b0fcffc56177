from pathlib import Path

import pytest
from PIL import Image

from lit_safety.attacks.style_lora import StyleLoRA, tint
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm


def test_the_tint_by_hand() -> None:
    """Sepia of (100, 50, 200): red 39.3 + 38.45 + 37.8 = 115.55; green 34.9 + 34.3 + 33.6 = 102.8; blue 27.2 + 26.7 +
    26.2 = 80.1. Half of it: (107.775, 76.4, 140.05), rounded (108, 76, 140). White stays within 255."""
    image = Image.new("RGB", (1, 1), (100, 50, 200))
    assert tint(image, 0.0).getpixel((0, 0)) == (100, 50, 200)
    assert tint(image, 0.5).getpixel((0, 0)) == (108, 76, 140)
    assert tint(Image.new("RGB", (1, 1), "white"), 1.0).getpixel((0, 0)) == (255, 255, 239)


def test_it_is_trained_once_on_the_base_and_weighed_next_to_the_arms_own(
    make_target, pair_shards: Path, tiny_adapter: Path
) -> None:
    attack = StyleLoRA(shards=str(pair_shards), weights=[0.0, 0.5, 1.0], steps=2, pictures=2, batch_size=2, rank=2)
    attack.check([], [])
    target = make_target(Arm(adapter=str(tiny_adapter)))
    stages = list(attack.stages(target))
    assert [stage.budget for stage in stages] == [0.5, 1.0]
    (folder,) = target.work.iterdir()
    written = (folder / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    list(attack.stages(make_target()))
    assert (folder / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == written
    assert stages[0].identity["style_sha256"] == stages[1].identity["style_sha256"]


def test_bad_input(tiny_adapter: Path) -> None:
    with pytest.raises(UserError, match="give either adapter, or shards"):
        StyleLoRA()
    with pytest.raises(UserError, match="give either adapter, or shards"):
        StyleLoRA(adapter=str(tiny_adapter), shards="x")
    with pytest.raises(UserError, match="no adapter at"):
        StyleLoRA(adapter="nothing/here").check([], [])
    with pytest.raises(UserError, match="tint"):
        StyleLoRA(shards="x", tint=2.0)
