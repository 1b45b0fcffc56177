"""Checkpoints are whole or not there; what a kill between two renames leaves is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy

from lit_safety.callbacks.checkpoint import AtomicCheckpointIO, NotWritten, in_folders, swap
from lit_safety.cli.run_files import last_checkpoint
from tests.helpers.checkpoint_folders import number_of, save_folder
from tests.helpers.full_disk import full_disk


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    """The second write meets a full disk."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1, "weights": torch.ones(1000)}, path)
    with pytest.raises(NotWritten, match=r"last\.ckpt: cannot be written \(File too large\)"), full_disk(1000):
        writer.save_checkpoint({"step": 2, "weights": torch.ones(1000)}, path)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
    assert writer.load_checkpoint(path, weights_only=True)["step"] == 1
    writer.save_checkpoint({"step": 3}, path)
    assert writer.load_checkpoint(path, weights_only=True)["step"] == 3


def test_a_folder_takes_its_name_from_whatever_has_it(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    for number in (1, 2):
        swap(save_folder(tmp_path / ".last.ckpt.partial", number), path)
        assert number_of(path) == number
        assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_kill_between_two_renames_leaves_the_numbered_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = tmp_path / "2026-11-21_10-00-00" / "checkpoints"
    kept.mkdir(parents=True)
    save_folder(kept / "last.ckpt", 1)
    save_folder(kept / "step=2.ckpt", 2)
    rename = Path.rename

    def killed(self: Path, target: Any) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        swap(save_folder(kept / ".last.ckpt.partial", 2), kept / "last.ckpt")
    assert not (kept / "last.ckpt").exists()
    os.utime(kept / "step=2.ckpt")
    assert last_checkpoint(tmp_path) == kept / "step=2.ckpt"
    (kept / "step=2.ckpt").rename(tmp_path / "elsewhere")  # where `save_top_k: 0` keeps none
    assert last_checkpoint(tmp_path) == kept / ".last.ckpt.old"
    shutil.rmtree(kept / ".last.ckpt.partial")  # the resumed run saves, and is killed there again
    save_folder(kept / ".last.ckpt.partial", 3)
    with pytest.raises(KeyboardInterrupt):
        swap(kept / ".last.ckpt.partial", kept / "last.ckpt")
    assert number_of(last_checkpoint(tmp_path)) == 1
    monkeypatch.undo()
    swap(kept / ".last.ckpt.partial", kept / "last.ckpt")
    assert [one.name for one in kept.iterdir()] == ["last.ckpt"]


def test_which_strategies_write_folders():
    def trainer(strategy: object) -> Any:
        return SimpleNamespace(strategy=strategy)

    assert in_folders(trainer(DeepSpeedStrategy()))
    assert in_folders(trainer(ModelParallelStrategy()))
    assert not in_folders(trainer(ModelParallelStrategy(save_distributed_checkpoint=False)))
    assert not in_folders(trainer(DDPStrategy()))
