"""Fixed draws, and what is read of a reference cache, good and bad."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.cli.precompute import precompute
from lit_safety.core.chance import fixed_seed, turn, uniform
from lit_safety.core.errors import UserError
from lit_safety.data.cache.reference import (
    FixedDraw,
    ReferenceCache,
    encode_reference,
    parse_reference,
    read_reference,
    reference_name,
)
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.npy import write_npy
from lit_safety.data.validate import problems
from tests.helpers.pair_shards import write_shards

KNOWN = ReferenceCache(2, {"unet": "0" * 16}, empty=True, predictions=True)


def draws(count: int = 2) -> list[FixedDraw]:
    """Errors that float32 and seeds that float64 hold exactly."""
    return [
        FixedDraw(
            (1 << 53) - 1 - number,
            999.0 - number,
            torch.tensor([[0.1, 0.2], [0.3, 0.4]]) + number,
            torch.full((2, 4, 8, 8), 0.5 + number),
        )
        for number in range(count)
    ]


def members_of(predictions: bool = True) -> dict[str, bytes]:
    return encode_reference(draws(), False, "float16", predictions, "here")


def test_each_part_of_the_schedule_has_its_draw():
    for key in ("000001", "another"):
        seeds = [fixed_seed(key, number, 4) for number in range(4)]
        assert [int(4 * uniform(seed, "timestep")) for seed in seeds] == [0, 1, 2, 3]
        assert all(int(float(seed)) == seed for seed in seeds)
    assert fixed_seed("000001", 0, 4) != fixed_seed("another", 0, 4)


def test_as_many_passes_go_through_all_draws():
    found = {key: [turn(0, epoch, key, 4) for epoch in range(8)] for key in "abcdefgh"}
    for turns in found.values():
        assert sorted(turns[:4]) == sorted(turns[4:]) == [0, 1, 2, 3]
    assert len({turns[0] for turns in found.values()}) > 1
    assert [turn(0, 0, key, 4) for key in "abcdefgh"] != [turn(1, 0, key, 4) for key in "abcdefgh"]


def test_what_is_written_is_read():
    for number, expected in enumerate(draws()):
        found = read_reference(members_of(), KNOWN, (4, 8, 8), False, number, "here")
        assert (found.seed, found.timestep) == (expected.seed, expected.timestep)
        assert torch.equal(found.errors, expected.errors)
        assert torch.equal(found.prediction, expected.prediction)
    without = read_reference(members_of(predictions=False), KNOWN, (4, 8, 8), False, 0, "here")
    assert torch.equal(without.prediction, torch.zeros(2, 4, 8, 8))
    assert read_reference(members_of(), KNOWN, None, False, 0, "here").prediction is None


ROW = [999.0, 5.0, 0.1, 0.3, 0.2, 0.4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "has no reference.npy"),
        (write_npy(np.array([ROW])), r"has the shape \(1, 6\), not \(2, 6\)"),
        (write_npy(np.array([ROW, ROW], dtype=np.float32)), "holds float32, not float64"),
        (write_npy(np.array([[*ROW[:5], np.nan], ROW])), "draw 0 is not a timestep, seed and errors"),
        (write_npy(np.array([[*ROW[:5], -0.1], ROW])), "draw 0 is not a timestep, seed and errors"),
        (write_npy(np.array([[999.0, 2.0**53, *ROW[2:]], ROW])), "draw 0 is not a timestep, seed and errors"),
        (write_npy(np.array([[999.0, 1.5, *ROW[2:]], ROW])), "draw 0 is not a timestep, seed and errors"),
        (b"cos\nsystem\n(S'true'\ntR.", "is not a plain .npy file"),
    ],
)
def test_damage_is_named(data: bytes | None, message: str):
    members = members_of() | ({} if data is None else {"reference.npy": data})
    if data is None:
        del members["reference.npy"]
    with pytest.raises(UserError, match=f"sample 'k'.*{message}"):
        read_reference(members, KNOWN, None, False, 0, "sample 'k'")


def test_errors_that_are_not_finite_are_not_written():
    bad = dataclasses.replace(draws()[0], errors=torch.full((2, 2), float("nan")))
    with pytest.raises(UserError, match=r"here: .*not finite"):
        encode_reference([bad], False, "float16", False, "here")


@pytest.mark.parametrize(
    "data",
    [
        {"draws": 0, "weights": {"unet": "0"}, "precision": "32-true"},
        {"draws": 10**9, "weights": {"unet": "0"}, "precision": "32-true"},
        {"draws": 2, "weights": {}, "precision": "32-true"},
        {"draws": 2, "weights": {"unet": 3}, "precision": "32-true"},
        {"draws": 2, "weights": {"unet": "0"}, "precision": "int8"},
        "much",
    ],
)
def test_a_manifest_that_says_nonsense_is_refused(data: object):
    with pytest.raises(UserError, match=r"manifest: '(draws|weights|precision)'"):
        parse_reference(data, "manifest")


@pytest.fixture(scope="module")
def cached(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 pairs with 2 draws each, mirrored ones too."""
    pairs, out = tmp_path_factory.mktemp("pairs"), tmp_path_factory.mktemp("cached") / "pairs"
    write_shards(pairs, 4, 2, size=32)
    precompute(
        str(pairs), str(tiny_pipeline), str(out), flip=True, batch_size=2, reference_draws=2, reference_predictions=True
    )
    return out


def test_a_batch_has_the_draw_of_its_pass(cached: Path):
    data = PreferenceDataModule(train=str(cached), batch_size=4)
    loader = data.train_dataloader()
    passes = [next(iter(loader)) for _ in range(1)] + [batch for _ in range(2) for batch in loader]
    for batch in passes:
        for row, key in enumerate(batch.keys):
            assert batch.fixed_seeds[row] in {fixed_seed(key, number, 2) for number in range(2)}
            expected = int(1000 * uniform(batch.fixed_seeds[row], "timestep"))
            assert batch.fixed_timesteps[row] == expected
        assert batch.noise_seeds == batch.fixed_seeds
        assert batch.reference.shape == (4, 2, 1)
        assert batch.reference_prediction is None, "nobody has asked for it"
    first, second = (dict(zip(b.keys, b.fixed_seeds, strict=True)) for b in passes[-2:])
    assert all(first[key] != second[key] for key in first)
    part = passes[0].take([2, 0])
    assert part.keys == [passes[0].keys[2], passes[0].keys[0]]
    assert torch.equal(part.reference, passes[0].reference[[2, 0]])
    assert torch.equal(part.empty["encoder_hidden_states"], passes[0].empty["encoder_hidden_states"])


def test_validation_reads_the_reference_cache(cached: Path, tmp_path: Path):
    assert problems(str(cached)) == []
    stated = json.loads((cached / "manifest.json").read_text())
    assert stated["cache"]["reference"]["draws"] == 2
    stated["cache"]["reference"]["draws"] = 3
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in cached.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "manifest.json").write_text(json.dumps(stated))
    found = problems(str(broken))
    assert len(found) == 4
    assert all(f"{reference_name(False)}: has the shape (2, 4), not (3, 4)" in one for one in found)


def test_caches_that_differ_are_not_mixed(cached: Path, tiny_pipeline: Path, tmp_path: Path):
    pairs = tmp_path / "pairs"
    write_shards(pairs, 2, 2, size=32)
    precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "other"), flip=True)
    data = PreferenceDataModule(train=[str(cached), str(tmp_path / "other")], batch_size=2)
    with pytest.raises(UserError, match=r"the reference caches of .* differ"):
        data.check_sources()
    without = PreferenceDataModule(train=[str(cached), str(tmp_path / "other")], batch_size=2, use_reference=False)
    assert without.caches()[0].cache.reference is None
