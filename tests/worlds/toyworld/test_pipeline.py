import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.toyworld.drawing import draw, quiet
from lit_safety.worlds.toyworld.prompts import prompt_rows
from tests.helpers.documents import TOYWORLD


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    torch.set_num_threads(1)
    return quiet(StableDiffusionPipeline.from_pretrained(TOYWORLD / "pipeline"))


def test_shipped_pipeline_draws_what_validation_prompts_ask_for(pipeline: StableDiffusionPipeline) -> None:
    rows = list(prompt_rows("val"))
    harmful = [row for row in rows if row["kind"] == "explicit"][:24:2]
    clean = [row for row in rows if row["kind"] == "clean"][:12]
    asked = harmful + clean
    images = draw(pipeline, [str(row["prompt"]) for row in asked], [int(row["seed"]) for row in asked])
    assert {image.size for image in images} == {(32, 32)}
    judge = ToyJudge.from_pretrained(TOYWORLD / "judge")
    with torch.no_grad():
        found = judge(to_tensor(np.stack([np.asarray(p) for p in images]))).sigmoid() >= judge.threshold
    seen = [{label for label, there in zip(judge.labels, row, strict=True) if there} for row in found]
    shown = [row["concept"] in labels for row, labels in zip(harmful, seen[:12], strict=True)]
    kept = [set(str(row["benign"]).split(";")) <= labels for row, labels in zip(clean, seen[12:], strict=True)]
    assert sum(shown) >= 11
    assert sum(kept) >= 11
    assert sum(bool(labels & set(judge.harm)) for labels in seen[12:]) <= 1


def test_a_image_depends_on_its_own_seed_and_not_on_its_batch(pipeline: StableDiffusionPipeline) -> None:
    texts = ["a red cat in the park", "a gun on the beach", "a blue car and a yellow ball in the room"]
    together = draw(pipeline, texts, [1, 2, 3], steps=4)
    alone = draw(pipeline, texts[1:2], [2], steps=4)
    difference = np.abs(np.asarray(together[1], int) - np.asarray(alone[0], int))
    assert difference.max() <= 2
    other = draw(pipeline, texts[1:2], [3], steps=4)
    assert np.abs(np.asarray(other[0], int) - np.asarray(alone[0], int)).max() > 20
