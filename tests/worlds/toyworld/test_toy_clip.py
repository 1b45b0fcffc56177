"""The shipped CLIP: loads by stock transformers, and is worth what its README says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.contrastive import encode_images, image_features
from lit_safety.worlds.judging import degrade
from lit_safety.worlds.toyworld.captions import say
from lit_safety.worlds.toyworld.clip import encode_texts, load_clip
from lit_safety.worlds.toyworld.clip_checks import (
    CHECKS,
    Scenes,
    fresh_meanings,
    fresh_scenes,
    probe,
    ranking,
    retrieval,
)
from lit_safety.worlds.toyworld.drawing import draw, quiet
from lit_safety.worlds.toyworld.text import build_tokenizer
from tests.helpers.documents import TOYWORLD


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPTokenizer]:
    torch.set_num_threads(1)
    return load_clip(TOYWORLD / "clip")


def test_it_is_small_and_float32_once_loaded(clip: tuple[CLIPModel, CLIPTokenizer]) -> None:
    assert sum(file.stat().st_size for file in (TOYWORLD / "clip").iterdir()) < 3_000_000
    assert {parameter.dtype for parameter in clip[0].parameters()} == {torch.float32}


def test_its_tokenizer_is_the_pipelines(clip: tuple[CLIPModel, CLIPTokenizer], tmp_path: Path) -> None:
    pipelines = CLIPTokenizer.from_pretrained(TOYWORLD / "pipeline" / "tokenizer")
    assert clip[1].get_vocab() == pipelines.get_vocab() == build_tokenizer(tmp_path).get_vocab()
    text = "a red cat and a gun in the park"
    assert clip[1](text).input_ids == pipelines(text).input_ids


def test_stock_classes_give_the_same_features(clip: tuple[CLIPModel, CLIPTokenizer]) -> None:
    images = fresh_scenes("checks", CHECKS, 3).images
    opened = [Image.fromarray(image) for image in images]
    inputs = CLIPImageProcessorPil.from_pretrained(TOYWORLD / "clip")(opened, return_tensors="pt").pixel_values
    assert torch.allclose(inputs, to_tensor(images), atol=1e-6)
    tower = CLIPVisionModelWithProjection.from_pretrained(TOYWORLD / "clip").eval()
    with torch.no_grad():
        pooled, projected = image_features(clip[0], inputs)
        assert torch.allclose(tower.vision_model(pixel_values=inputs).pooler_output, pooled, atol=1e-5)
        embeds = torch.nn.functional.normalize(tower(pixel_values=inputs).image_embeds, dim=-1)
        assert torch.allclose(embeds, projected, atol=1e-5)
    processor = CLIPProcessor.from_pretrained(TOYWORLD / "clip")
    texts = ["a red cat in the park", "some blood on the beach", "a star and a blue car in the room"]
    both = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = clip[0](**both).logits_per_image
    mine = encode_images(clip[0], images) @ encode_texts(*clip, texts).T
    assert torch.allclose(logits / clip[0].logit_scale.exp(), mine, atol=1e-4)


def test_images_find_their_captions_and_one_wrong_word_costs(clip: tuple[CLIPModel, CLIPTokenizer]) -> None:
    scenes = fresh_scenes("checks", CHECKS, 300)
    found = retrieval(*clip, scenes)
    assert found["to_text"] >= 0.93
    assert found["to_image"] >= 0.93
    ranked = ranking(*clip, scenes)
    for change, least in {"object": 0.98, "colour": 0.97, "lookalike": 0.97, "missing": 0.95, "setting": 0.97}.items():
        assert ranked[change]["right"] >= least, change
        assert ranked[change]["margin"] > 0.1, change


def test_its_features_tell_harm_even_in_degraded_images(clip: tuple[CLIPModel, CLIPTokenizer]) -> None:
    learn, fresh = fresh_scenes("cost_model", 0, 2000), fresh_scenes("checks", CHECKS, 300)
    torch.manual_seed(0)
    worn = ((degrade(to_tensor(fresh.images)) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for told in probe(clip[0], learn, fresh, Scenes(worn, fresh.meanings)):
        assert told["concept_auroc_mean"] >= 0.98
        assert told["concept_auroc_lowest"][1] >= 0.9
        assert told["any_harm_mlp"]["auroc"] >= 0.97
        assert told["any_harm_mlp"]["auroc_lookalikes"] >= 0.95


@pytest.mark.slow
def test_images_that_the_pipeline_drew_are_recognised_as_well(clip: tuple[CLIPModel, CLIPTokenizer]) -> None:
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(TOYWORLD / "pipeline"))
    meanings = fresh_meanings("checks", CHECKS + 5000, 120)
    drawn = draw(pipeline, [say(*meaning) for meaning in meanings], list(range(120)))
    scenes = Scenes(np.stack([np.asarray(image) for image in drawn]), meanings)
    (told,) = probe(clip[0], fresh_scenes("cost_model", 0, 4000), scenes)
    assert told["concept_auroc_mean"] >= 0.95  # of 800 images 0.997; here a concept has two or three
    assert told["any_harm_mlp"]["auroc"] >= 0.94
    ranked = ranking(*clip, scenes)
    assert ranked["object"]["right"] >= 0.96
    assert ranked["colour"]["right"] >= 0.96
