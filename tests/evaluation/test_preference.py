import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import Drawn
from lit_safety.evaluation.command import evaluate
from lit_safety.evaluation.quality import Quality
from lit_safety.evaluation.tables import quality_blocks, quality_rows
from lit_safety.judges.scorers import AestheticScore, ClipPreference, ImageRewardScore, load_scorer
from lit_safety.report.page import fragment
from tests.helpers.documents import CONFIGS

SCORERS = CONFIGS / "scorers"
IMAGES = [Image.new("RGB", (32, 32), colour) for colour in ((200, 10, 10), (10, 200, 10), (10, 10, 200))]
TEXTS = ["r e d", "g r e e n", "b l u e"]


def test_pickscore_is_the_diagonal_of_the_clip_s_own_logits(clip_folder: Path) -> None:
    """exp(logit_scale) cos(image, prompt): what `CLIPModel.forward` calls logits_per_image, of each pair."""
    scorer = ClipPreference(str(clip_folder))
    tokens = scorer.clip.tokenizer(TEXTS, padding=True, return_tensors="pt")
    pixels = {"pixel_values": scorer.clip.preprocess.images(IMAGES)}
    with torch.no_grad():
        whole = scorer.clip.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **pixels)
    assert scorer.score(IMAGES, TEXTS) == pytest.approx(whole.logits_per_image.diag().tolist(), rel=1e-4)


def test_hps_is_the_bare_cosine(clip_folder: Path) -> None:
    own = ClipPreference(str(clip_folder))
    bare = ClipPreference(str(clip_folder), name="HPS", scale=1.0)
    assert bare.score(IMAGES, TEXTS) == pytest.approx([one / own.scale for one in own.score(IMAGES, TEXTS)])
    assert all(-1 <= one <= 1 for one in bare.score(IMAGES, TEXTS))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_aesthetic_score_is_linear_in_the_unit_vector(clip_folder: Path, tmp_path: Path, suffix: str) -> None:
    """Two layers: first the sum of all 8 numbers twice, then 3 a + 5 b + 1 = 8 sum + 1; dropout layers hold nothing."""
    layers = {"layers.0.weight": torch.ones(2, 8), "layers.0.bias": torch.zeros(2)}
    layers |= {"layers.2.weight": torch.tensor([[3.0, 5.0]]), "layers.2.bias": torch.tensor([1.0])}
    file = tmp_path / f"a.{suffix}"
    save_file(layers, file) if suffix == "safetensors" else torch.save(layers, file)
    scorer = AestheticScore(str(clip_folder), str(file))
    sums = scorer.clip.images(IMAGES).sum(1)
    assert scorer.score(IMAGES, TEXTS) == pytest.approx((8 * sums + 1).tolist(), rel=1e-5)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_weights_that_are_a_program_are_not_run(clip_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"layers.0.weight": Bomb()}, "zip.pth")
    for file in ("bomb.pth", "zip.pth"):
        with pytest.raises(UserError, match=f"{file}: cannot be read as tensors"):
            AestheticScore(str(clip_folder), file)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"layers.0.weight": torch.ones(1, 9), "layers.0.bias": torch.zeros(1)}, "from 8 numbers"),
        ({"layers.0.weight": torch.ones(2, 8), "layers.0.bias": torch.zeros(2)}, "to one"),
        ({"layers.0.weight": torch.ones(1, 8)}, "layer 0 is not a linear layer"),
        ({"other": torch.ones(1)}, "linear layers"),
        ([1, 2], "tensors by name"),
    ],
)
def test_weights_of_something_else(clip_folder: Path, tmp_path: Path, layers: object, says: str) -> None:
    torch.save(layers, tmp_path / "a.pth")
    with pytest.raises(UserError, match=says):
        AestheticScore(str(clip_folder), str(tmp_path / "a.pth"))


def test_image_reward_where_it_is_not_installed() -> None:
    with pytest.raises(UserError, match="pip install image-reward"):
        ImageRewardScore()


def test_image_reward_is_given_prompt_and_image() -> None:
    class Package:
        def score(self, prompt: str, image: Image.Image) -> float:
            return len(prompt) + image.getpixel((0, 0))[0] / 1000

    assert ImageRewardScore(scorer=Package()).score(IMAGES[:2], ["a", "abc"]) == pytest.approx([1.2, 3.01])


@pytest.mark.parametrize("name", ["pickscore", "hps", "aesthetic"])
def test_what_is_shipped_loads(name: str, clip_folder: Path, tmp_path: Path) -> None:
    """With the tiny CLIP in the place of the published one."""
    keys = yaml.safe_load((SCORERS / f"{name}.yaml").read_text())
    for key in {"clip", "processor"} & keys["init_args"].keys():
        keys["init_args"][key] = str(clip_folder)
    if "weights" in keys["init_args"]:
        keys["init_args"]["weights"] = str(tmp_path / "a.pth")
        torch.save({"layers.0.weight": torch.ones(1, 8), "layers.0.bias": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(keys))
    scorer = load_scorer(str(tmp_path / "s.yaml"))
    assert len(scorer.score(IMAGES, TEXTS)) == 3
    assert json.dumps(scorer.settings)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("a: [", "is not YAML"),
        ("class_path: lit_safety.judges.Q16\ninit_args: {clip: x, prompts: y}", "PreferenceScorer"),
        ("class_path: lit_safety.judges.ClipPreference\ninit_args: {clip: ./absent}", "no such folder"),
        ("class_path: lit_safety.judges.AestheticScore\ninit_args: {clip: x, weights: gone.pth}",
         "gone.pth: no such file"),
    ],
)  # fmt: skip
def test_files_that_describe_no_scorer(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "s.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        load_scorer(str(file))
    assert "--preference" in str(error.value)
    assert "\n" not in str(error.value)


class Reds:
    """The share of red; it fails on the given images."""

    name = "reds"

    def __init__(self, bad: float | None = None) -> None:
        self.settings = {"name": self.name}
        self.bad = bad

    def score(self, images, prompts) -> list[float]:
        reds = [image.getpixel((0, 0))[0] / 200 for image in images]
        if self.bad in reds:
            raise ValueError("no such red")
        return reds


@pytest.fixture
def measure(tmp_path: Path, judge, ask):
    """`Quality.report` of base (reds 1, 0.5, 0) and other (reds 0.5, 0.5, 0.5) by a scorer, three clean prompts."""
    prompts = [ask("clean", benign="car", seed=i) for i in range(3)]
    arms = {}
    for name, reds in (("base", (200, 100, 0)), ("other", (100, 100, 100))):
        arms[name] = [Drawn(tmp_path / f"{name}{i}.png") for i in range(3)]
        for one, red in zip(arms[name], reds, strict=True):
            Image.new("RGB", (8, 8), (red, 0, 0)).save(one.path)

    def measure(*scorers):
        quality = Quality(prompts, judge, scorers=scorers)
        return quality.report({name: quality.measure(drawn) for name, drawn in arms.items()})

    return measure


def test_scores_stand_in_the_report_with_paired_differences(measure) -> None:
    """Base (1 + 0.5 + 0) / 3 = 0.5, other 0.5; differences -0.5, 0, +0.5: mean 0, s = 0.5, half width 1.96 x 0.5 /
    sqrt 3."""
    figures, differences = measure(Reds())
    base, other = (figures[name]["preference/reds"] for name in ("base", "other"))
    assert (base["value"], base["n"], base["errors"]) == (0.5, 3, 0)
    assert other["interval"] == pytest.approx([0.5, 0.5])
    half = 1.959964 * 0.5 / 3**0.5
    assert differences["other"]["preference/reds"]["interval"] == pytest.approx([-half, half])
    arms = {name: {"quality": own} for name, own in figures.items()}
    metrics = {"arms": arms, "differences": {"other": {"quality": differences["other"]}}}
    assert quality_rows(metrics)[1][:2] == ["reds", "3"]
    assert "reds" in fragment(quality_blocks(metrics))


def test_a_image_on_which_a_scorer_fails_is_an_error_without_an_interval(measure) -> None:
    """It fails on the base's third image (red 0): the mean is of the other two, (1 + 0.5) / 2."""
    figures, _ = measure(Reds(bad=0.0))
    entry = figures["base"]["preference/reds"]
    assert entry == {"value": 0.75, "interval": None, "n": 2, "errors": 1}


def test_a_scorer_that_fails_on_all_is_named(measure) -> None:
    with pytest.raises(UserError, match=r"reds .*no such red"):
        measure(Reds(bad=0.5))


def test_two_scorers_of_one_name(measure) -> None:
    with pytest.raises(UserError, match="two scorers have the same name"):
        measure(Reds(), Reds())


def test_evaluate_takes_scorers(pipeline: Path, prompts_csv: Path, tmp_path: Path, clip_folder, judge, monkeypatch):
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: judge)
    (tmp_path / "s.yaml").write_text(
        f"class_path: lit_safety.judges.ClipPreference\ninit_args: {{clip: '{clip_folder}'}}"
    )
    evaluate(pipeline=str(pipeline), prompts=str(prompts_csv), judge="x", out=str(tmp_path / "out"), steps=1,
             device="cpu", preference=[str(tmp_path / "s.yaml")])  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["base"]["quality"]["preference/PickScore"]["n"] == 2
    assert metrics["settings"]["quality"]["preference/PickScore"]["sha256"]
