"""CostModel through the real command line and the shipped YAML: fit, cache, calibrate, export, test, predict."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.core.errors import UserError
from lit_safety.cost_model import PairwiseCostLoss, load_cost_model
from lit_safety.cost_model.degrade import Degradation
from lit_safety.cost_model.metrics import CollectedCosts, cost_figures
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.sample import SIDES
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.source import open_source
from lit_safety.modules import CostModel

Arguments = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_handlers_on_closed_streams() -> None:
    """Lightning's own log handlers keep the stderr of their first use, which pytest has replaced since."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "cost_model" / "latest"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "cost_model" / "model.safetensors")


def test_a_fit_ends_in_a_calibrated_model_that_test_and_predict_agree_with(
    cost_model_command: Arguments, latest: Path, tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(cost_model_command("fit")) == 0
    folder = latest / "cost_model"
    config = json.loads((folder / "config.json").read_text())
    assert config["metrics"]["ranking_accuracy"] == 1.0
    assert config["metrics"]["auroc/violence"] == 1.0
    assert config["settings"]["pairs a step"] == 8
    assert weights(latest)["temperature"] != 1
    capsys.readouterr()
    assert main(cost_model_command("test", "--ckpt_path", "last")) == 0
    printed = capsys.readouterr().out
    for figure in ("test/ranking_accuracy", "test/sign_accuracy", "test/auroc", "test/ece", "test/ece/hate"):
        assert figure in printed
    assert main(cost_model_command("predict", "--ckpt_path", "last")) == 0
    (file,) = (tmp_path / "runs" / "cost_model" / "predict").glob("*/costs-0.csv")
    rows = list(csv.DictReader(file.open()))
    assert [row["side"] for row in rows] == ["chosen", "rejected"] * 16
    assert {row["harmful"] for row in rows} == {"true", "false"}
    batch = next(iter(PreferenceDataModule(test=str(labelled / "val"), val_batch_size=16).test_dataloader()))
    expected = load_cost_model(folder).costs(batch.to("cpu").rejected)
    found = [float(row["cost"]) for row in rows if row["side"] == "rejected"]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)


def test_training_from_cached_features_is_training_on_images(
    cost_model_command: Arguments, latest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same views of the same pairs in every step; a second run finds the features and CLIP is not asked again."""
    assert main(cost_model_command("fit", "--model.init_args.feature_cache", "null")) == 0
    on_images = weights(latest)
    assert main(cost_model_command("fit")) == 0
    assert len(list((tmp_path / "features").iterdir())) == 2
    for name, value in weights(latest).items():
        assert torch.allclose(value, on_images[name], atol=1e-4), name

    def asked(self: Any, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("CLIP was asked although all features are cached")

    monkeypatch.setattr("lit_safety.cost_model.ClipTower.__call__", asked)
    assert main(cost_model_command("fit")) == 0


def test_batch_8_is_batch_4_accumulated_twice(cost_model_command: Arguments, latest: Path):
    sgd = [
        "--model.init_args.optimizer.class_path",
        "torch.optim.SGD",
        "--model.init_args.optimizer.init_args.lr",
        "0.1",
    ]
    sgd += ["--model.init_args.lr_scheduler", "null", "--trainer.gradient_clip_val", "null"]
    sgd += ["--trainer.val_check_interval", "null", "--trainer.max_steps", "3"]
    assert main(cost_model_command("fit", *sgd)) == 0
    whole = weights(latest)
    parts = ["--data.init_args.batch_size", "4", "--trainer.accumulate_grad_batches", "2"]
    assert main(cost_model_command("fit", *sgd, *parts)) == 0
    for name, value in weights(latest).items():
        if name.startswith("adapter."):
            assert torch.allclose(value, whole[name], atol=1e-5), name


@pytest.mark.parametrize("steps", [4, 8])  # none and one validation before the end
def test_steps_after_the_last_validation_are_calibrated_and_measured_too(
    cost_model_command: Arguments, latest: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    """The exported figures are those that the exported weights give on the 16 validation pairs; validation sees 4."""
    calibrated: list[int] = []
    calibrate = CostModel._calibrate

    def noted(self: CostModel) -> None:
        calibrate(self)
        calibrated.append(self.trainer.global_step)

    monkeypatch.setattr(CostModel, "_calibrate", noted)
    partly = ["--data.init_args.val_batch_size", "4", "--trainer.limit_val_batches", "1"]
    assert main(cost_model_command("fit", "--trainer.max_steps", str(steps), *partly)) == 0
    assert calibrated == ([4] if steps == 4 else [6, 8])
    folder = latest / "cost_model"
    written = json.loads((folder / "config.json").read_text())["metrics"]
    (read,) = PreferenceDataModule(test=str(labelled / "val"), val_batch_size=16).test_dataloader()
    batch = read.to("cpu")
    scorer, collected = load_cost_model(folder), CollectedCosts()
    costs = torch.stack([scorer.costs(batch.chosen), scorer.costs(batch.rejected)], dim=1)
    collected.update(costs, batch.harmful, batch.categories)
    expected = {name: float(value) for name, value in cost_figures(*collected.compute()).items()}
    assert written == pytest.approx(expected | {"pairs": 16}, abs=1e-4)
    assert "not calibrated" not in (folder / "README.md").read_text()


class FaultyGradient(PairwiseCostLoss):
    """A finite loss whose gradient is not."""

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, parts = super().__call__(*arguments)
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, parts


def test_a_gradient_that_is_not_finite_reaches_no_file(tiny_clip: Path, labelled: Path, tmp_path: Path):
    module = CostModel(str(tiny_clip), width=4, loss=FaultyGradient(), degradation=Degradation(views=0))
    keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False)
    with pytest.raises(UserError, match=r"not finite at samples \d{5}"):
        trainer.fit(module, PreferenceDataModule(train=str(labelled / "train"), batch_size=4))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_info_nce_trains_too(cost_model_command: Arguments, latest: Path):
    loss = ["--model.init_args.loss.class_path", "lit_safety.cost_model.InfoNCECostLoss"]
    assert main(cost_model_command("fit", *loss, "--model.init_args.loss.init_args.temperature", "0.2")) == 0
    config = json.loads((latest / "cost_model" / "config.json").read_text())
    assert config["settings"]["temperature"] == 0.2
    assert config["metrics"]["auroc"] == 1.0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.init_args.clip", "/no/such/clip"], "/no/such/clip"),
        (["--data.init_args.flip", "true"], "data.init_args.flip mirrors"),
        (["--model.init_args.degradation.blur", "0"], "model.init_args.degradation"),
        (["--model.init_args.width", "0"], "width must be at least 1"),
        (["--model.init_args.loss.init_args.norm_weight", "-1"], "must not be negative"),
    ],
)
def test_bad_settings_are_one_line(
    cost_model_command: Arguments, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(cost_model_command("fit", *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]


def test_a_checkpoint_of_another_width_is_refused(cost_model_command: Arguments, capsys: pytest.CaptureFixture[str]):
    assert main(cost_model_command("fit")) == 0
    assert main(cost_model_command("test", "--ckpt_path", "last", "--model.init_args.width", "8")) == 2
    assert "another CLIP, features or width" in capsys.readouterr().err


def test_the_check_command_measures_on_shards(
    tiny_cost_model: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["cost-model", str(tiny_cost_model), "--out", str(tmp_path / "check")]
    assert main([*arguments, "--shards", str(labelled / "val")]) == 0
    assert "ranking_accuracy" in capsys.readouterr().out
    figures = json.loads((tmp_path / "check" / "figures.json").read_text())["shards"]
    assert (figures["pairs"], figures["pairs_ranked"], figures["images"]) == (16, 16, 32)
    assert 0 <= figures["ece"] <= 1
    assert main(arguments) == 2
    assert "give --shards" in capsys.readouterr().err
    assert main([*arguments, "--pipeline", "p"]) == 2
    assert "needs --prompts" in capsys.readouterr().err


def relabelled(given: Path, folder: Path, labels: dict[str, bool | None] | None) -> Path:
    """The same pairs with other labels; None: as they are for the first half, unknown for the rest."""
    source = open_source(str(given), "given")
    with ShardWriter(folder, samples_per_shard=8, provenance={"source": "drawn"}) as writer:
        for number in range(len(source.paths)):
            shard = source.open_shard(number)
            for place in range(source.manifest.shardlist[number].nsamples):
                about = json.loads(shard.read_member(place, "json"))
                about["harmful"] = labels or (about["harmful"] if place < 4 else {"chosen": None, "rejected": None})
                images = [Image.open(io.BytesIO(shard.read_member(place, f"{side}.png"))) for side in SIDES]
                writer.write(f"{number:02d}{place:03d}", about, *images)
            shard.close()
    return folder


UNKNOWN = {"chosen": None, "rejected": None}


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (UNKNOWN, "harmful"),
        ({"chosen": True, "rejected": True}, "safe"),
        ({"chosen": None, "rejected": False}, "harmful"),
    ],
)
def test_training_pairs_without_both_labels_are_refused(
    cost_model_command: Arguments, labelled: Path, tmp_path: Path, labels: dict[str, bool | None], says: str,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    train = relabelled(labelled / "val", tmp_path / "train", labels)
    assert main(cost_model_command("fit", "--data.init_args.train", str(train))) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(train) in error
    assert f"no image is labelled {says}" in error
    assert not list((tmp_path / "runs").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("labels", "reason"), [(UNKNOWN, "labels are unknown"), ({"chosen": False, "rejected": False}, "safe")]
)
def test_validation_pairs_without_both_labels_give_no_calibration_and_the_card_says_so(
    cost_model_command: Arguments,
    labelled: Path,
    tmp_path: Path,
    latest: Path,
    labels: dict[str, bool | None],
    reason: str,
):
    val = relabelled(labelled / "val", tmp_path / "val", labels)
    assert main(cost_model_command("fit", "--data.init_args.val", str(val))) == 0
    card = (latest / "cost_model" / "README.md").read_text()
    config = json.loads((latest / "cost_model" / "config.json").read_text())
    assert reason in config["calibration"]["not_calibrated"]
    assert f"Not calibrated: {config['calibration']['not_calibrated']}" in card
    assert "above 0 harmful" not in card
    assert "the probability that" not in card
    assert (weights(latest)["temperature"], weights(latest)["bias"]) == (1, 0)
    load_cost_model(latest / "cost_model")


def test_the_card_says_on_how_many_labels_it_was_calibrated(
    cost_model_command: Arguments, labelled: Path, tmp_path: Path, latest: Path
):
    val = relabelled(labelled / "val", tmp_path / "val", None)
    assert main(cost_model_command("fit", "--data.init_args.val", str(val))) == 0
    config = json.loads((latest / "cost_model" / "config.json").read_text())
    calibration = config["calibration"]
    assert calibration.pop("middle_safe") < calibration.pop("middle_harmful")
    assert calibration == {"images": 16, "harmful": 8, "not_calibrated": None}
    card = (latest / "cost_model" / "README.md").read_text()
    assert "above 0 harmful" in card
    assert "16 labelled images, 8 of them harmful" in card


def test_nothing_is_measured_where_no_label_is_known(
    tiny_cost_model: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = relabelled(labelled / "val", tmp_path / "shards", UNKNOWN)
    assert main(["cost-model", str(tiny_cost_model), "--out", str(tmp_path / "x"), "--shards", str(shards)]) == 2
    assert str(shards) in capsys.readouterr().err
