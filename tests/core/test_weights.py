"""Which weights of a folder are read, and whether they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.adapters.lora_file import read_lora
from lit_safety.adapters.user_file import read_tensors
from lit_safety.core.errors import UserError
from lit_safety.core.weights import (
    DIFFUSERS,
    POINTER,
    TRANSFORMERS,
    choose_weights,
    need_weights,
    open_safetensors,
    read_header,
    weights_of,
)
from lit_safety.users.table import Users

WHOLE, HALF = "model.safetensors", "model.fp16.safetensors"


def pieces(count: int, variant: str = "") -> list[str]:
    return [f"model{variant}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("there", "variant", "read"),
    [
        ([WHOLE], None, [WHOLE]),
        ([HALF], "fp16", [HALF]),
        ([WHOLE, HALF, "model.bf16.safetensors"], None, [WHOLE]),
        ([HALF, "model.bf16.safetensors"], "fp16", [HALF]),
        (["model.bf16.safetensors"], "bf16", ["model.bf16.safetensors"]),
        (["model.fp32.safetensors", HALF], "fp32", ["model.fp32.safetensors"]),
        (["model.non_ema.safetensors", WHOLE], None, [WHOLE]),
        (["._model.safetensors", HALF], "fp16", [HALF]),
        (pieces(3), None, pieces(3)),
        ([*pieces(3), *pieces(2, ".fp16")], None, pieces(3)),
        (pieces(2, ".fp16"), "fp16", pieces(2, ".fp16")),
        ([WHOLE, *pieces(2, ".fp16")], None, [WHOLE]),
        (["diffusion_pytorch_model.safetensors", WHOLE], None, [WHOLE]),
    ],
)
def test_full_precision_is_read_where_it_is_there_and_half_else(there: list[str], variant: str | None, read: list[str]):
    for names in (there, there[::-1]):
        found = choose_weights(names, TRANSFORMERS)
        assert found is not None
        assert (found.variant, list(found.names)) == (variant, read)


@pytest.mark.parametrize(
    "there",
    [[], ["._model.safetensors"], ["model.non_ema.safetensors"], ["model.ema.safetensors"], ["lora.safetensors"]],
)
def test_what_does_not_draw_is_not_read(there: list[str]):
    assert choose_weights(there, TRANSFORMERS) is None


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ([WHOLE, *pieces(2)], WHOLE),
        (pieces(3)[:2], pieces(3)[2]),
        (pieces(3, ".fp16")[1:], pieces(3, ".fp16")[0]),
        ([*pieces(2), *pieces(3)], pieces(2)[0]),
    ],
)
def test_weights_that_contradict_each_other_or_lack_a_piece_are_refused(there: list[str], named: str):
    with pytest.raises(UserError, match=named):
        choose_weights(there, TRANSFORMERS)


def cut_in_two(folder: Path, variant: str = "", **index: object) -> Path:
    folder.mkdir()
    names = pieces(2, variant and f".{variant}")
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.ones(2)}, folder / name)
    stated = {"metadata": {}, "weight_map": {f"w{number}": name for number, name in enumerate(names)}} | index
    place = folder / f"model.safetensors.index.{variant and f'{variant}.'}json"
    place.write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_index_says_which_pieces_there_are(tmp_path: Path, variant: str):
    folder = cut_in_two(tmp_path / "pieces", variant)
    found = need_weights(folder, TRANSFORMERS)
    assert list(found.names) == pieces(2, variant and f".{variant}")
    (folder / found.names[1]).unlink()
    with pytest.raises(UserError, match=found.names[1]):
        weights_of(folder, TRANSFORMERS)


@pytest.mark.parametrize(
    "index",
    [{"weight_map": {"w": "../other.safetensors"}}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"w": 1}}],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, index: dict[str, object]):
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        weights_of(cut_in_two(tmp_path / "pieces", **index), TRANSFORMERS)


def test_an_index_that_is_missing_is_named(tmp_path: Path):
    folder = cut_in_two(tmp_path / "pieces", "fp16")
    (folder / "model.safetensors.index.fp16.json").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.fp16\.json is missing"):
        weights_of(folder, TRANSFORMERS)


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors", "pytorch_model.bin", "model.ckpt"],
)
def test_what_is_there_instead_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError) as refused:
        need_weights(tmp_path, DIFFUSERS)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def written(file: Path, header: bytes) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    return file


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b"null",
        b'"x"',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"__metadata__":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',  # whose numbers are not there
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}',
        b'{"a": 1}',
        b"{\xff}",
    ],
)
def test_a_header_of_another_kind_or_depth_is_one_line_that_names_the_file(tmp_path: Path, header: bytes):
    file = written(tmp_path / "model.safetensors", header)
    for reading in (lambda: read_header(file), lambda: need_weights(tmp_path, TRANSFORMERS)):
        with pytest.raises(UserError) as refused:
            reading()
        assert str(file) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_header_says_where_the_numbers_are(tmp_path: Path):
    save_file({"a": torch.arange(3.0), "b": torch.zeros(2, dtype=torch.int8)}, tmp_path / WHOLE, {"format": "pt"})
    header, base = read_header(tmp_path / WHOLE)
    assert set(header) == {"a", "b"}
    start, stop = header["a"]["data_offsets"]
    content = (tmp_path / WHOLE).read_bytes()[base + start : base + stop]
    assert torch.frombuffer(bytearray(content), dtype=torch.float32).tolist() == [0.0, 1.0, 2.0]


def test_a_pointer_of_git_lfs_is_distinguished_from_a_damaged_file(tmp_path: Path):
    (tmp_path / WHOLE).write_bytes(POINTER + b"v1\noid sha256:" + b"a" * 64 + b"\nsize 34\n")
    with pytest.raises(UserError, match="git lfs pull"), open_safetensors(tmp_path / WHOLE):
        pass


@pytest.mark.parametrize("reading", [read_lora, Users, lambda file: read_tensors(file, {"x": (4, 4)}), read_header])
def test_every_reader_tells_a_pointer_and_a_damaged_header(reading: Callable[[Path], object], tmp_path: Path):
    (tmp_path / "pointer.safetensors").write_bytes(POINTER + b"v1\noid sha256:0\nsize 3\n")
    written(tmp_path / "list.safetensors", b"[1]")
    written(tmp_path / "deep.safetensors", b'{"a":' * 5000 + b"1" + b"}" * 5000)
    for name, says in (("pointer", "git lfs pull"), ("list", "list.safetensors"), ("deep", "deep.safetensors")):
        with pytest.raises(UserError, match=says) as refused:
            reading(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(refused.value)


def test_files_of_macos_next_to_an_adapter_are_not_its_weights(tmp_path: Path):
    layer = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "style.safetensors")
    (tmp_path / "._style.safetensors").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert read_lora(tmp_path).keys() == {layer}
