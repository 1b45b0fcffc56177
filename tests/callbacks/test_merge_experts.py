"""What `MergeExperts` refuses before the training; what it writes is tested through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lit_safety.callbacks import MergeExperts
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.merging.options import CalibrationOptions
from lit_safety.modules import DPOExpert


@pytest.fixture
def module(tiny_pipeline: Path) -> DPOExpert:
    module = DPOExpert(str(tiny_pipeline), categories=["hate", "violence"])
    module.configure_model()
    return module


def trainer_of(train: str | None) -> Trainer:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = PreferenceDataModule(train=train)
    return trainer


def test_weights_are_of_the_experts_under_any_spelling(module: DPOExpert):
    callback = MergeExperts(method="sum", weights={"Hate": 0.5})
    assert callback.recipe.weight("hate") == 0.5
    callback.on_fit_start(trainer_of(None), module)
    with pytest.raises(UserError, match="names sexual; the experts are hate, violence"):
        MergeExperts(method="sum", weights={"nudity": 0.5}).on_fit_start(trainer_of(None), module)
    with pytest.raises(UserError, match=r"`MergeExperts\.weights`: unknown category 'guns'"):
        MergeExperts(method="sum", weights={"guns": 0.5})


def test_regmean_needs_harmful_prompts_of_each_expert_and_clean_ones(
    module: DPOExpert, category_shards: Path, tmp_path: Path
):
    """Of the training shards unless a file is named; a missing file is reported before the training."""
    MergeExperts().on_fit_start(trainer_of(str(category_shards)), module)
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,kind,category\na gun,explicit,hate\na red gun,implicit,violence\na cat,clean,\n")
    named = MergeExperts(calibration=CalibrationOptions(prompts=str(file)))
    named.on_fit_start(trainer_of(None), module)
    for text, missing in (
        ("a gun,explicit,hate\na cat,clean,\n", "harmful prompt of violence"),
        ("a gun,explicit,hate\na red gun,implicit,violence\n", "clean or look-alike prompt"),
    ):
        file.write_text(f"prompt,kind,category\n{text}")
        with pytest.raises(UserError, match=rf"prompts\.csv.* no {missing}.* sum, mean"):
            named.on_fit_start(trainer_of(None), module)
    with pytest.raises(UserError, match=r"calibration\.prompts.*regmean.*sum, mean"):
        MergeExperts().on_fit_start(trainer_of(None), module)
    MergeExperts(method="sum").on_fit_start(trainer_of(None), module)


def test_comerge_needs_prompts_from_somewhere(module: DPOExpert, category_shards: Path, tmp_path: Path):
    """A CSV need not say what its prompts are about, unless categories are asked for."""
    with pytest.raises(UserError, match=r"calibration\.prompts"):
        MergeExperts(method="comerge").on_fit_start(trainer_of(None), module)
    plain = tmp_path / "plain.csv"
    plain.write_text("prompt\na gun\n")
    for callback, train in (
        (MergeExperts(method="comerge"), str(category_shards)),
        (MergeExperts(method="comerge", calibration=CalibrationOptions(prompts=str(plain))), None),
        (MergeExperts(method="comerge", unit="weight", normalise=False), None),
    ):
        callback.on_fit_start(trainer_of(train), module)


@pytest.mark.parametrize(
    ("text", "categories", "named"),
    [(None, None, "cannot be read"), ("text\nx\n", None, "no column `prompt`"),
     ("prompt\na gun\n", ["hate"], "no column `category`"),
     ("prompt,category\na gun,sexual\n", None, "no harmful prompt of hate, violence")],
)  # fmt: skip
def test_prompts_that_will_not_do_are_named_before_the_training(
    module: DPOExpert, tmp_path: Path, text: str | None, categories: list[str] | None, named: str
):
    file = tmp_path / "prompts.csv"
    if text is not None:
        file.write_text(text)
    options = CalibrationOptions(prompts=str(file), categories=categories)
    with pytest.raises(UserError, match=named):
        MergeExperts(method="comerge", calibration=options).on_fit_start(trainer_of(None), module)


def test_impossible_options_are_named():
    for options, named in (
        ({"rank": 0}, "--rank"), ({"method": "comerge", "weights": {"hate": 2.0}}, "--weights"),
        ({"weights": {"hate": -1.0}}, "--weights"), ({"mu": -1.0}, "--mu"), ({"epsilon": 0.0}, "--epsilon"),
        ({"null_space": 0.1}, "--null_space"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=named):
            MergeExperts(**options)
