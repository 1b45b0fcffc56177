"""Export and reload, the scorer, and folders that must be refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_safety.core.errors import UserError
from lit_safety.cost_model import CostScorer, load_cost_model, save_cost_model
from lit_safety.cost_model.files import check_border
from lit_safety.cost_model.network import ClipTower, CostAdapter
from lit_safety.data.reading.decode import to_tensor

IMAGES = [Image.new("RGB", (16, 16), (200, 30, 90)), Image.new("RGB", (40, 24), (5, 250, 90)),
            Image.new("L", (16, 16), 77)]  # fmt: skip


def random_scorer(clip: Path) -> CostScorer:
    torch.manual_seed(3)
    tower = ClipTower(str(clip), "pooled")
    adapter = CostAdapter(tower.width, 12)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    return CostScorer(tower, adapter, temperature=2.5, bias=-0.75)


@pytest.fixture
def folder(tiny_clip: Path, tmp_path: Path) -> Path:
    return save_cost_model(
        tmp_path / "model", random_scorer(tiny_clip), {"auroc": 0.99, "auroc/hate": 0.9}, {"steps": 3}
    )


def test_a_reloaded_model_gives_the_same_costs(tiny_clip: Path, folder: Path):
    before, after = random_scorer(tiny_clip), load_cost_model(folder)
    assert torch.equal(before.costs(IMAGES), after.costs(IMAGES))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "| auroc | 0.99 |" in (folder / "README.md").read_text()


SCORE_WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed: importing it, or a part of it, fails
from PIL import Image
from lit_safety.cost_model import load_cost_model
print(load_cost_model(sys.argv[1]).costs([Image.new("RGB", (40, 24), (5, 250, 90))]).item())
"""


def test_it_loads_and_scores_without_torchvision(folder: Path):
    command = [sys.executable, "-c", SCORE_WITHOUT_TORCHVISION, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(load_cost_model(folder).costs(IMAGES[1:2]).item(), abs=1e-6)


def test_an_adapter_starts_as_a_linear_probe_of_cost_0():
    adapter = CostAdapter(6, 4)
    features = torch.randn(5, 6)
    assert (adapter(features) == 0).all()
    assert torch.equal(adapter.adapted(features), adapter.norm(features))


def test_costs_are_raw_costs_shifted_and_scaled(tiny_clip: Path):
    """C = (raw - 0.75) / 2.5."""
    scorer = random_scorer(tiny_clip)
    raw = scorer.adapter(scorer.tower(torch.stack([to_tensor(IMAGES[0])])))
    assert scorer.costs(IMAGES[:1]).item() == pytest.approx((raw.item() - 0.75) / 2.5)


def test_images_and_tensors_agree_in_any_mixture_of_sizes(tiny_clip: Path):
    scorer = random_scorer(tiny_clip)
    together = scorer.costs([*IMAGES, IMAGES[0]])
    assert together[3] == together[0]
    for image, cost in zip(IMAGES, together, strict=False):
        assert scorer.costs(to_tensor(image.convert("RGB"))[None]).item() == pytest.approx(cost.item(), abs=1e-5)
    assert scorer.costs([]).shape == (0,)


def test_another_clip_is_refused_by_fingerprint(folder: Path, make_clip: Callable[..., Path], tmp_path: Path):
    other = make_clip(tmp_path / "other", seed=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"clip": str(other)}))
    with pytest.raises(UserError, match="is another one") as error:
        load_cost_model(folder)
    assert str(folder) in str(error.value)
    assert str(other) in str(error.value)
    assert config["clip_fingerprint"][:12] in str(error.value)


def test_the_clip_is_found_from_another_working_directory(
    make_clip: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    make_clip(Path("clip"))
    save_cost_model("models/mine", random_scorer(Path("clip")), {}, {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_cost_model("../models/mine").costs(IMAGES).isfinite().all()
    (tmp_path / "clip").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="neither at clip nor at"):
        load_cost_model("../models/mine")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("folder", "lacks config.json"),
        ("weights", "model.safetensors"),
        ("json", "cannot be read as JSON"),
        ("kind", "`kind`"),
        ("version", "version 2"),
        ("features", "features"),
        ("width", "does not fit config.json"),
        ("cut", "is damaged"),
        ("nan", "not finite"),
        ("temperature", "temperature is -1"),
        ("no temperature", "does not fit"),
    ],
)
def test_a_folder_that_is_damaged_is_named(folder: Path, damage: str, says: str):
    config, weights = folder / "config.json", folder / "model.safetensors"
    changes = {"kind": {"kind": "judge"}, "version": {"version": 2}, "features": {"features": "texts"},
               "width": {"width": 5}}  # fmt: skip
    if damage in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[damage]))
    elif damage == "json":
        config.write_text("{")
    elif damage == "weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage != "folder":
        tensors = load_file(weights)
        if damage == "nan":
            tensors["adapter.head.weight"][0, 0] = float("nan")
        elif damage == "temperature":
            tensors["temperature"] = torch.tensor(-1.0)
        else:
            del tensors["temperature"]
        save_file(tensors, weights)
    with pytest.raises(UserError, match=says) as error:
        load_cost_model(folder / "absent" if damage == "folder" else folder)
    assert str(folder) in str(error.value)


def test_zero_is_a_border_only_after_a_calibration(tiny_cost_model: Path, tmp_path: Path) -> None:
    check_border(tiny_cost_model, "--cost_model")
    folder = shutil.copytree(tiny_cost_model, tmp_path / "cost")
    config = json.loads((folder / "config.json").read_text())
    reason = "all 4 known labels were harmful"
    config["calibration"] = {"images": 4, "harmful": 4, "not_calibrated": reason}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^--cost_model .*not calibrated .{reason}.*: fit it"):
        check_border(folder, "--cost_model")
