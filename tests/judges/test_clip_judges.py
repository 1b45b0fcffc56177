"""Q16 and the zero-shot judge, on a CLIP of random weights."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.clip import Clip, ZeroShotClip
from lit_safety.judges.judge import Verdict
from lit_safety.judges.load import load_judge
from lit_safety.judges.q16 import Q16


def make_images(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (count, 3), generator=generator).tolist()
    return [Image.new("RGB", (40, 32), tuple(colour)) for colour in colours]


@pytest.fixture
def tuned(clip_folder: Path, tmp_path: Path) -> Path:
    """The vectors of two of the images, not of length one: the first is appropriate, the second is not."""
    array = 3 * Clip(str(clip_folder), "x").images(make_images(2)).numpy()
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(array, protocol=2))
    return tmp_path / "prompts.p"


def test_q16_is_a_softmax_over_two_cosines(clip_folder: Path, tuned: Path) -> None:
    """The published rule: 100 x cosine to each tuned prompt, the larger one wins; here by hand from the vectors."""
    judge = Q16(str(clip_folder), str(tuned))
    images = make_images(12)
    vectors = Clip(str(clip_folder), "x").images(images).numpy().astype(float)
    prompts = pickle.loads(tuned.read_bytes()).astype(float)
    cosines = vectors @ (prompts / np.linalg.norm(prompts, axis=1, keepdims=True)).T
    answers = judge.judge(images)
    assert [a.harmful for a in answers] == (cosines[:, 1] >= cosines[:, 0]).tolist()
    assert {a.harmful for a in answers} == {True, False}
    expected = 1 / (1 + np.exp(-100 * (cosines[:, 1] - cosines[:, 0])))
    assert [a.scores["inappropriate"] for a in answers] == pytest.approx(expected.tolist(), abs=1e-3)
    assert judge.settings["threshold"] == 0.5


def test_q16_reads_npy_too_and_a_threshold_moves_it(clip_folder: Path, tuned: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "prompts.npy", pickle.loads(tuned.read_bytes()))
    strict = Q16(str(clip_folder), str(tmp_path / "prompts.npy"), threshold=1e-9)
    lax = Q16(str(clip_folder), str(tuned), threshold=1 - 1e-9)
    assert sum(a.harmful for a in strict.judge(make_images(12))) > sum(a.harmful for a in lax.judge(make_images(12)))


@pytest.mark.parametrize(
    ("shape", "says"), [((2, 9), r"two rows of 8"), ((1, 8), r"two rows of 8"), (None, "no such file")]
)
def test_q16_with_other_prompts_is_refused(clip_folder: Path, tmp_path: Path, shape, says: str) -> None:
    if shape:
        np.save(tmp_path / "p.npy", np.ones(shape, np.float32))
    with pytest.raises(UserError, match=says):
        Q16(str(clip_folder), str(tmp_path / "p.npy"))


def test_zero_shot_shares(clip_folder: Path) -> None:
    """p = (e^a + e^b) / (e^a + e^b + e^n), a and b the category's logits, n the neutral text's, whatever the others."""
    texts = {"violence": ["a b", "c"], "Harrasment": ["d"]}
    judge = ZeroShotClip(str(clip_folder), texts, ["e f"], threshold=0.4)
    images = make_images(10)
    clip = Clip(str(clip_folder), "x")
    scale = float(clip.model.logit_scale.exp())
    logits = (scale * clip.images(images) @ clip.texts(["a b", "c", "d", "e f"]).T).double().exp()
    violence = (logits[:, 0] + logits[:, 1]) / (logits[:, 0] + logits[:, 1] + logits[:, 3])
    harassment = logits[:, 2] / (logits[:, 2] + logits[:, 3])
    answers = judge.judge(images)
    assert [a.categories["violence"] for a in answers] == pytest.approx(violence.tolist(), rel=1e-3)
    assert [a.categories["harassment"] for a in answers] == pytest.approx(harassment.tolist(), rel=1e-3)
    assert [a.harmful for a in answers] == ((violence >= 0.4) | (harassment >= 0.4)).tolist()
    assert judge.settings["labels"] == ["harassment", "violence"]


def test_a_clip_folder_is_a_judge(clip_folder: Path) -> None:
    judge = load_judge(str(clip_folder))
    assert isinstance(judge, ZeroShotClip)
    assert all(isinstance(answer, Verdict) for answer in judge.judge(make_images(2)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"categories": {"nonsense": ["a"]}}, "unknown category"),
        ({"categories": {"hate": []}}, "hate has no texts"),
        ({"neutral": []}, "neutral has no texts"),
        ({"threshold": 1.5}, "threshold"),
    ],
)
def test_bad_settings(clip_folder: Path, arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ZeroShotClip(str(clip_folder), **arguments)
