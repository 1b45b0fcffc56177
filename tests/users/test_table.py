from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.core.errors import UserError
from lit_safety.users.table import Users, UserTable, write_users


def test_users_are_found_in_the_order_asked_for(tmp_path: Path):
    write_users(tmp_path, {"0000002": torch.tensor([3.0, 4.0]), "0000001": torch.tensor([1.0, 2.0])})
    users = Users(tmp_path)
    assert users.dimension == 2
    assert sorted(users.ids) == ["0000001", "0000002"]
    assert "0000001" in users
    assert "1" not in users
    found = users.embeddings(["0000001", "0000002", "0000001"])
    assert found.tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]
    assert users.embeddings([]).shape == (0, 2)


def test_bad_users_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"expected a folder with users\.safetensors"):
        Users(tmp_path)
    file = tmp_path / "users.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="readable safetensors"):
        Users(tmp_path)
    save_file({}, file)
    with pytest.raises(UserError, match="0 users"):
        Users(tmp_path)
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, file)
    with pytest.raises(UserError, match=r"user 'b' has shape \(4,\), that of user 'a' \(3,\)"):
        Users(tmp_path)
    save_file({"a": torch.zeros(3), "b": torch.full((3,), float("nan"))}, file)
    users = Users(file)
    assert users.embeddings(["a"]).shape == (1, 3)
    with pytest.raises(UserError, match="user 'b' holds numbers that are not finite"):
        users.embeddings(["a", "b"])
    with pytest.raises(UserError, match=r"user 'c' is not in .* \(2 users"):
        users.embeddings(["c"])


def test_bad_users_are_not_written(tmp_path: Path):
    for match, embeddings in (
        ("user 'b' is not a vector", {"a": torch.zeros(3), "b": torch.full((3,), float("inf"))}),
        ("user 'b' has 4 numbers, the first user's 3", {"a": torch.zeros(3), "b": torch.zeros(4)}),
    ):
        with pytest.raises(UserError, match=match):
            write_users(tmp_path, embeddings)
    assert not list(tmp_path.iterdir())


def test_a_table_of_several_files(tmp_path: Path):
    """A user of two files counts as the first file says; whose numbers are how many is one for all."""
    first = Users(write_users(tmp_path / "a", {"x": torch.tensor([1.0]), "y": torch.tensor([2.0])}))
    second = Users(write_users(tmp_path / "b", {"y": torch.tensor([9.0]), "z": torch.tensor([3.0])}))
    table = UserTable([first, second])
    assert sorted(table.ids) == ["x", "y", "z"]
    assert table.embeddings(["z", "y", "x"]).tolist() == [[3.0], [2.0], [1.0]]
    assert table.embeddings([]).shape == (0, 1)
    with pytest.raises(UserError, match=r"user 'w' is not in .*a.users\.safetensors or .*b.users\.safetensors"):
        table.embeddings(["w"])
    third = Users(write_users(tmp_path / "c", {"v": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"of 2 numbers, .* of 1"):
        UserTable([first, third])
