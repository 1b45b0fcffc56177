"""`prompts.safetensors`: written row by row, read row by row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_safety.core.errors import UserError
from lit_safety.data.cache.prompt_table import PromptTable, PromptTables, write_prompt_table

PROMPTS = [f"prompt {number}" for number in range(10)]


def encode(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Rows that tell their prompt: its length and its bytes' sum."""
    rows = [[float(len(prompt)), float(sum(prompt.encode()))] for prompt in prompts]
    return {"hidden": torch.tensor(rows)[:, None].repeat(1, 3, 1), "pooled": torch.tensor(rows)}


def write(folder: Path, encoder=encode, prompts: Sequence[str] = PROMPTS, dtype: str = "float32") -> Path:
    return write_prompt_table(folder, prompts, partial(map, encoder), {"model": "m"}, dtype, 3, lambda: None)


def test_every_prompt_has_its_row_and_the_empty_one_too(tmp_path: Path):
    table = PromptTable(write(tmp_path))
    assert len(table) == 11
    for prompt in PROMPTS:
        found = table.get(prompt)
        assert found is not None
        expected = encode([prompt])
        assert torch.equal(found["hidden"], expected["hidden"][0])
        assert torch.equal(found["pooled"], expected["pooled"][0])
    assert table.get("prompt") is None
    assert table.empty()["pooled"].tolist() == [[0.0, 0.0]]
    assert set(load_file(tmp_path / "prompts.safetensors")) == {"hashes", "hidden", "pooled"}


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path):
    whole = write(tmp_path / "whole").read_bytes()
    seen: list[str] = []

    def stops(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        if len(seen) >= 6:
            raise KeyboardInterrupt
        seen.extend(prompts)
        return encode(prompts)

    def counts(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        seen.extend(prompts)
        return encode(prompts)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", stops)
    assert not (tmp_path / "parts" / "prompts.safetensors").exists()
    assert write(tmp_path / "parts", counts).read_bytes() == whole
    assert len(seen) == 11
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["prompts.safetensors"]
    write(tmp_path / "parts", counts)
    assert len(seen) == 11, "what is complete is not encoded again"
    write(tmp_path / "parts", counts, prompts=PROMPTS[:2])
    assert len(PromptTable(tmp_path / "parts" / "prompts.safetensors")) == 3


def test_a_row_that_is_not_finite_names_its_prompt(tmp_path: Path):
    def overflows(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {
            "hidden": encode(prompts)["hidden"] * torch.tensor([[[1e6 if p == PROMPTS[4] else 1.0]] for p in prompts])
        }

    with pytest.raises(
        UserError, match="hidden of the prompt 'prompt 4' is not finite in float16; try --dtype float32"
    ):
        write(tmp_path, overflows, dtype="float16")
    assert not (tmp_path / "prompts.safetensors").exists()


def changed(path: Path, **tensors: torch.Tensor) -> Path:
    held = load_file(path)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in (held | tensors).items()}, path)
    return path


def test_tables_that_are_not_what_they_should_be_are_refused(tmp_path: Path):
    path = write(tmp_path)
    hashes = PromptTable(path).hashes.copy()
    for wrong, message in (
        ({"pooled": torch.zeros(3, 2)}, r"\['pooled'\]"),
        ({"pooled": torch.zeros(11, 2, dtype=torch.int64)}, "pooled"),
        ({"hashes": torch.tensor(1, dtype=torch.uint8)}, r"\['hidden', 'pooled'\]"),
        ({"hashes": torch.zeros(11, 4, dtype=torch.uint8)}, "hashes"),
        ({"hashes": torch.zeros(11, 16, dtype=torch.uint8)}, "not sorted"),
    ):
        with pytest.raises(UserError, match=message):
            PromptTable(changed(write(tmp_path / message[:4].strip("\\[]'")), **wrong))
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    for path in ("junk", "nowhere"):
        with pytest.raises(UserError, match="is not a readable cache of prompts"):
            PromptTable(tmp_path / f"{path}.safetensors")
    rows = torch.frombuffer(bytearray(b"".join(one.ljust(16, b"\0") for one in hashes)), dtype=torch.uint8)
    without = {"hashes": rows.view(11, 16)[:1], "hidden": torch.zeros(1, 2)}
    save_file(without, tmp_path / "one.safetensors")
    table = PromptTable(tmp_path / "one.safetensors")
    if "" in table:
        pytest.fail("the first hash is that of the empty prompt; choose other prompts")
    with pytest.raises(UserError, match="lacks the empty prompt"):
        table.empty()


def test_a_missing_prompt_and_a_row_with_nan_are_named(tmp_path: Path):
    path = write(tmp_path)
    with pytest.raises(UserError, match=f"here: its prompt 'unknown' is missing in {path}"):
        PromptTables({str(path): None}).get("unknown", "here")
    changed(path, pooled=torch.full((11, 2), float("nan")))
    with pytest.raises(UserError, match="pooled of the prompt 'prompt 1' is not finite"):
        PromptTable(path).get("prompt 1")
