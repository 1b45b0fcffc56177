"""What is asked of a datamodule: ours answers all of it, somebody else's a part or nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from lit_safety.callbacks import ExportAdapter, ProbeMargin, RunSummary
from lit_safety.core.errors import UserError
from lit_safety.data import PairBatch, PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.protocols import (
    Batched,
    Consecutive,
    LeavingOut,
    Mirroring,
    PairData,
    Seeded,
    WithTest,
    WithTrain,
    WithVal,
    datamodule_of,
    shards_of,
)
from lit_safety.modules import DPOExpert, PreferenceModule
from lit_safety.objectives import DiffusionDPO

SETTINGS = (Batched, Consecutive, LeavingOut, Mirroring, Seeded, WithTest, WithTrain, WithVal)


def test_ours_answers_everything():
    data = PreferenceDataModule("train", val=["a", "b"])
    assert isinstance(data, PairData)
    assert all(isinstance(data, setting) for setting in SETTINGS)
    assert shards_of(data) == {"train": ["train"], "val": ["a", "b"]}


@pytest.mark.parametrize("data", [None, object(), LightningDataModule()], ids=["loaders", "any", "Lightning's"])
def test_somebody_elses_is_asked_for_what_it_has(data: object):
    assert not isinstance(data, PairData)
    assert not any(isinstance(data, setting) for setting in SETTINGS)
    assert shards_of(data) == {}


def test_a_part_is_taken_as_it_is():
    data: Any = SimpleNamespace(train="folder", batch_size=3, labels=["no", "method"], users=[1])
    assert shards_of(data) == {"train": ["folder"]}
    assert isinstance(data, Batched)
    assert not isinstance(data, PairData)


def test_a_trainer_without_a_datamodule_has_none():
    assert datamodule_of(None) is None
    assert datamodule_of(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)) is None


class Own(LightningDataModule):
    """Batches made by hand."""

    def __init__(self, batch: PairBatch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)


@pytest.fixture
def batch() -> PairBatch:
    return PairBatch(
        keys=["a", "b"], seeds=[1, 2], prompts=["x", "y"], prompt_kinds=["clean"] * 2, categories=[("hate",)] * 2,
        orders=["safety"] * 2, chosen=-torch.ones(2, 3, 32, 32), rejected=torch.ones(2, 3, 32, 32),
        clean=torch.ones(2), harmful=torch.zeros(2, 2), cost=torch.zeros(2, 2), has_cost=[True] * 2,
        score=torch.zeros(2, 2), has_score=[True] * 2, has_harmful=[True] * 2, user_ids=[None] * 2,
        category="hate",
    )  # fmt: skip


@pytest.mark.parametrize("kind", [PreferenceModule, DPOExpert])
def test_a_fit_with_somebody_elses_datamodule_goes_through(
    kind: Any, batch: PairBatch, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With all that looks at the data next to it: the summary, the probe, the card."""
    module = kind(str(tiny_pipeline), DiffusionDPO(beta=100.0))
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
        callbacks=[RunSummary(), ProbeMargin(1), ExportAdapter()],
    )  # fmt: skip
    trainer.fit(module, datamodule=Own(batch))
    assert trainer.global_step == 1
    assert "pairs an optimizer step" not in capsys.readouterr().out
    (card, *_) = sorted(tmp_path.rglob("README.md"))
    assert "unknown" in card.read_text()


def test_a_module_asks_and_the_datamodule_sets_itself(tmp_path: Path):
    """Predictions and images are left out by a question of the module's, and only for the sets that it names."""
    black = Image.new("RGB", (32, 32))
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("a", {"prompt": "x", "prompt_kind": "clean", "categories": [], "order": "safety",
                           "harmful": {"chosen": False, "rejected": False}}, black, black)  # fmt: skip
    data = PreferenceDataModule(str(tmp_path / "shards"), val=str(tmp_path / "shards"), batch_size=1)
    data.skip_images(["train"])
    data.setup()
    (train,), (val,) = list(data.train_dataloader()), list(data.val_dataloader())
    assert train.chosen is None
    assert val.chosen is not None
    assert train.harmful.tolist() == [[0.0, 0.0]]


def test_what_is_not_given_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.init_args\.test"):
        PreferenceDataModule(str(tmp_path)).labels("test")
