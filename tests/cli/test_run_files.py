import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.cli.run_files import (
    damage,
    find_checkpoint,
    last_checkpoint,
    new_folder,
    point_latest,
    remove_if_untrained,
)
from lit_safety.core.errors import UserError
from tests.helpers.checkpoint_folders import save_folder


def checkpoint(run: Path, age: float) -> Path:
    file = run / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "optimizer_states": []}, file)
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
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.yaml").touch()
    (tmp_path / "untrained" / "events.out.tfevents.1").touch()
    checkpoint(tmp_path / "trained", age=0)
    (tmp_path / "drawn" / "drawings").mkdir(parents=True)
    (tmp_path / "drawn" / "drawings" / "0.png").touch()
    for run in list(tmp_path.iterdir()):
        remove_if_untrained(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "trained"]


def test_a_damaged_last_checkpoint_gives_way_to_the_newest_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    last = checkpoint(tmp_path / "run", age=1)
    whole = shutil.copy2(last, last.with_name("step=2.ckpt"))
    os.utime(whole, (1e9 - 50, 1e9 - 50))
    content = last.read_bytes()
    for damaged in (content[:-200], b"", content[: len(content) // 2], bytes(len(content)), b"no checkpoint"):
        last.write_bytes(damaged)
        assert last_checkpoint(tmp_path) == whole
        said = capsys.readouterr().out
        assert str(last) in said
        assert str(whole) in said


def test_bytes_that_turned_are_noticed_by_their_checksum(tmp_path: Path):
    last = checkpoint(tmp_path / "run", age=1)
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "optimizer_states": []}, last)
    assert damage(last) is None
    content = bytearray(last.read_bytes())
    place = content.find(bytes(2000))
    content[place + 1000] = 1
    last.write_bytes(content)
    assert "checksum" in str(damage(last))


def test_where_nothing_is_whole_the_damaged_one_is_named(tmp_path: Path):
    last = checkpoint(tmp_path / "run", age=1)
    last.write_bytes(b"")
    with pytest.raises(UserError, match=str(last)):
        last_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path) is None


def whole_state(**changes: Any) -> dict[str, Any]:
    """What Lightning keeps of a training, in small."""
    state = {"state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [], "loops": {"fit_loop": {}}}
    return state | {"callbacks": {}, "global_step": 2, "pytorch-lightning_version": "2.5"} | changes


@pytest.mark.parametrize(
    "changes",
    [{"optimizer_states": None}, {"optimizer_states": []}, {"loops": None}, {"loops": {}}, {"callbacks": []},
     {"global_step": "2"}, {"global_step": None}, {"lr_schedulers": None}, {"pytorch-lightning_version": None}],
)  # fmt: skip
def test_no_training_goes_on_from_a_part_of_a_checkpoint(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint(tmp_path / "run", age=1)
    torch.save({key: value for key, value in whole_state(**changes).items() if value is not None}, last)
    with pytest.raises(UserError, match=str(last)):
        last_checkpoint(tmp_path, to_train=True)
    assert last_checkpoint(tmp_path) == last, "its weights can be drawn with"
    whole = last.with_name("step=2.ckpt")
    torch.save(whole_state(), whole)
    os.utime(whole, (1e9 - 500, 1e9 - 500))
    assert find_checkpoint(tmp_path, to_train=True) == whole
    assert str(last) in capsys.readouterr().out


def test_a_link_that_leads_nowhere_is_no_checkpoint(tmp_path: Path) -> None:
    last = checkpoint(tmp_path / "run", age=1)
    whole = last.rename(last.with_name("step=2.ckpt"))
    last.symlink_to("gone.ckpt")
    assert last_checkpoint(tmp_path) == whole


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("pwned"),)


@pytest.mark.parametrize("place", [".metadata", "last.ckpt", "checkpoint/mp_rank_00_model_states.pt"])
def test_nothing_of_a_hostile_checkpoint_is_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    if place == ".metadata":
        (tmp_path / place).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"state_dict": Hostile()}, tmp_path / place)
    assert damage(tmp_path / place if place == "last.ckpt" else tmp_path) is not None
    assert not (tmp_path / "pwned").exists()


def test_a_folder_that_lacks_a_part_is_no_whole_checkpoint(tmp_path: Path):
    folder = save_folder(tmp_path / "last.ckpt", 1)
    assert damage(folder) is None
    for name in ("meta.pt", "__0_0.distcp"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-10] if name == "meta.pt" else content[: len(content) // 2])
        assert name == "meta.pt" or name in str(damage(folder))
        assert damage(folder) is not None
        (folder / name).unlink()
        assert name in str(damage(folder))
        (folder / name).write_bytes(content)
    assert damage(folder) is None
    (folder / ".metadata").write_bytes(b"junk")
    assert damage(folder) is not None
