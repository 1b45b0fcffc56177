import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.adapters.user_file import read_tensors
from lit_safety.core.errors import UserError

LAYERS = {"mid": (8, 32)}


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_something_does_not(tmp_path: Path):
    file = tmp_path / "x.bin"
    torch.save({"psa_adapter": {"a": Hostile(tmp_path / "owned")}}, file)
    with pytest.raises(UserError, match=r"x\.bin is not a plain file of weights"):
        read_tensors(file, LAYERS)
    assert not (tmp_path / "owned").exists()


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(tmp_path: Path):
    """32 MiB of zeros, compressed to some kilobytes; the layer of 8 x 32 allows 8 * (512 + 32 * 65539) + 1 MiB."""
    plain = tmp_path / "plain.bin"
    torch.save({"psa_adapter": {"a": torch.zeros(8 << 20)}}, plain)
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    assert file.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"would unpack to \d+ bytes"):
        read_tensors(file, LAYERS)


def test_shapes_that_lie_about_memory_are_read_as_they_are(tmp_path: Path):
    """A stride of 0 makes a terabyte out of one number; reading it must not make it real."""
    file = tmp_path / "x.bin"
    torch.save({"user_proj": {"proj.weight": torch.ones(1).expand(1 << 20, 1 << 18)}}, file)
    assert read_tensors(file, LAYERS)[0]["user_proj.proj.weight"].shape == (1 << 20, 1 << 18)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "expected dictionaries"),
        ({"psa_adapter": [1]}, "expected dictionaries"),
        ({"psa_adapter": {"a": 1}}, r"psa_adapter\.a is not a plain tensor"),
        ({"psa_adapter": {"a": torch.arange(3)}}, r"psa_adapter\.a is not a plain tensor"),
        ({"psa_adapter": {"a": torch.eye(3).to_sparse()}}, r"psa_adapter\.a is not a plain tensor"),
        ({"psa_adapter": {"a": torch.zeros(3, device="meta")}}, r"psa_adapter\.a is not a plain tensor"),
    ],
)
def test_anything_but_tensors_in_dictionaries_is_refused(tmp_path: Path, content: Any, match: str):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(UserError, match=match):
        read_tensors(tmp_path / "x.bin", LAYERS)


def test_damaged_files_are_named(tmp_path: Path):
    whole = tmp_path / "whole.bin"
    torch.save({"psa_adapter": {"a": torch.zeros(8)}}, whole)
    (tmp_path / "cut.bin").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.bin"):
        read_tensors(tmp_path / "cut.bin", LAYERS)
    save_file({"a": torch.zeros(8)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"cut\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "cut.safetensors", LAYERS)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.safetensors and \.bin"):
        read_tensors(tmp_path / "x.ckpt", LAYERS)
