from pathlib import Path

import torch

from lit_safety.users.table import Users, copy_users, write_users


def test_users_go_along_and_nothing_else_does(tmp_path: Path) -> None:
    write_users(tmp_path / "a", {"x": torch.tensor([1.0, 2.0])})
    (tmp_path / "a" / "users.csv").write_text("User_ID\nx\n")
    (tmp_path / "a" / "manifest.json").write_text("{}")
    copy_users(str(tmp_path / "a"), tmp_path / "b")
    assert Users(tmp_path / "b").embeddings(["x"]).tolist() == [[1.0, 2.0]]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["users.csv", "users.safetensors"]
    copy_users(str(tmp_path / "a" / "{0..1}.tar"), tmp_path / "c")
    assert not (tmp_path / "c").exists()
