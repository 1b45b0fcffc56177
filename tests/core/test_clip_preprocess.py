"""The tensor path against `CLIPImageProcessorPil`, the processor that transformers uses without torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.clip_preprocess import ClipPreprocess
from lit_safety.core.errors import UserError
from lit_safety.data.reading.decode import to_tensor

CLIP_STD = 0.26862954


def make_image(width: int, height: int) -> Image.Image:
    """Smooth shapes with some noise, as images are."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (3 + c) + y / 7) + random.normal(0, 10, (height, width)) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (300, 200), (97, 411), (640, 480)], ids=str)
@pytest.mark.parametrize("shortest", [32, 224])
def test_it_equals_the_processor_of_transformers(size: tuple[int, int], shortest: int, tmp_path: Path):
    """Rounding to 8 bits after each of PIL's two passes against once: at most 2 of 255, half of a level on average."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": shortest}, crop_size={"height": shortest, "width": shortest}
    )
    processor.save_pretrained(tmp_path)
    image = make_image(*size)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    found = ClipPreprocess.read(tmp_path / "preprocessor_config.json")(to_tensor(image)[None])
    assert found.shape == expected.shape == (1, 3, shortest, shortest)
    level = 1 / 255 / CLIP_STD
    assert (found - expected).abs().max() <= 2.01 * level
    assert (found - expected).abs().mean() <= 0.3 * level


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (300, 200), (97, 411), (640, 480), (20, 31)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"size": {"height": 64, "width": 64}, "do_center_crop": False}, {"resample": 2, "crop_size": 40},
     {"do_resize": False, "crop_size": {"height": 50, "width": 37}}, {"image_mean": [0.5] * 3, "image_std": [0.3] * 3}],
    ids=str,
)  # fmt: skip
def test_images_get_the_very_numbers_of_the_processor_of_transformers(size: tuple[int, int], settings: dict):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**settings)
    images = [make_image(*size), make_image(*size).transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    found = ClipPreprocess.of(json.loads(processor.to_json_string()), "x").images(images)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_images_of_the_right_size_are_only_normalised(tmp_path: Path):
    """White in [-1, 1] is 1: (1 - 0.5) / 0.25 = 2 with mean 0.5 and std 0.25; nothing is resampled."""
    from transformers import CLIPImageProcessorPil

    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    CLIPImageProcessorPil(
        size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4}, **settings
    ).save_pretrained(tmp_path)  # fmt: skip
    preprocess = ClipPreprocess.read(tmp_path / "preprocessor_config.json")
    assert preprocess(torch.ones(1, 3, 4, 4)).flatten().tolist() == [2.0] * 48


def test_an_image_smaller_than_the_crop_gets_a_black_border_as_transformers_gives_it(tmp_path: Path):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 9, "width": 6})
    processor.save_pretrained(tmp_path)
    image = make_image(8, 6)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    found = ClipPreprocess.read(tmp_path / "preprocessor_config.json")(to_tensor(image)[None])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("content", ["{", "[]", '{"resample": 99}', '{"size": {"height": 2, "width": 3}}',
                                     '{"do_normalize": false}'])  # fmt: skip
def test_settings_it_does_not_know_are_refused_by_file(content: str, tmp_path: Path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: holds no CLIP preprocessing"):
        ClipPreprocess.read(file)


@pytest.mark.parametrize(
    "change",
    [{"image_std": [0, 0, 0]}, {"image_std": [0.2, 0.2]}, {"size": 10**9}, {"crop_size": {"height": 0, "width": 32}},
     {"image_mean": "0.5"}, {"rescale_factor": 1.0}],
)  # fmt: skip
def test_numbers_by_which_no_image_could_be_seen_are_refused(tmp_path: Path, change: dict[str, object]):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        ClipPreprocess.read(tmp_path / "preprocessor_config.json")


def test_a_nan_in_the_preprocessing_is_refused(tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [NaN, 0.5, 0.5]}')
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        ClipPreprocess.read(tmp_path / "preprocessor_config.json")
