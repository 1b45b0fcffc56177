import os
from pathlib import Path

import pytest
import torch

from lit_safety.errors import UserError
from lit_safety.run_folder import last_checkpoint, new_folder, point_latest, remove_if_barren


def checkpoint(run: Path, age: float) -> Path:
    file = run / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path):
    folders = {new_folder(tmp_path / "runs") for _ in range(20)}
    assert len(folders) == 20
    assert all(folder.is_dir() for folder in folders)


def test_last_is_the_newest_checkpoint_and_not_the_newest_folder(tmp_path: Path):
    newest = checkpoint(tmp_path / "a", age=1)
    checkpoint(tmp_path / "b", age=100)
    (tmp_path / "c").mkdir()
    point_latest(tmp_path / "b")
    assert last_checkpoint(tmp_path) == newest
    with pytest.raises(UserError, match="train first"):
        last_checkpoint(tmp_path / "c")


def test_a_newer_numbered_checkpoint_is_the_last_one(tmp_path: Path):
    """Where `save_last` is off, a `last.ckpt` may be a SIGTERM's of long ago. From weights alone nothing goes on."""
    last = checkpoint(tmp_path / "run", age=100)
    for name, more, age in (("step=2", {"optimizer_states": []}, 50), ("best", {}, 10), ("junk", None, 5)):
        file = last.with_name(f"{name}.ckpt")
        torch.save({"state_dict": {}, **more}, file) if more is not None else file.write_text("no checkpoint")
        os.utime(file, (1e9 - age, 1e9 - age))
    assert last_checkpoint(tmp_path) == last.with_name("step=2.ckpt")
    os.utime(last, (1e9 - 50, 1e9 - 50))
    assert last_checkpoint(tmp_path) == last


def test_latest_moves(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == tmp_path / name


def test_only_runs_without_result_are_removed(tmp_path: Path):
    (tmp_path / "barren").mkdir()
    (tmp_path / "barren" / "config.yaml").touch()
    (tmp_path / "barren" / "events.out.tfevents.1").touch()
    checkpoint(tmp_path / "trained", age=0)
    (tmp_path / "drawn" / "drawings").mkdir(parents=True)
    (tmp_path / "drawn" / "drawings" / "0.png").touch()
    for run in list(tmp_path.iterdir()):
        remove_if_barren(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "trained"]
