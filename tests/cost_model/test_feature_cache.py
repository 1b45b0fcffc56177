from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_safety.cost_model.degrade import Degradation
from lit_safety.cost_model.feature_cache import FeatureCache, compute_features
from lit_safety.cost_model.tower import ClipTower
from lit_safety.data import PreferenceDataModule
from lit_safety.errors import UserError


@pytest.fixture
def batches(labelled: Path):
    return list(PreferenceDataModule(test=str(labelled / "val"), val_batch_size=5).test_dataloader())


def test_cached_features_are_those_of_the_images(tiny_clip: Path, batches, tmp_path: Path):
    tower, worn = ClipTower(str(tiny_clip), "patches"), Degradation(views=2)
    cache = compute_features(batches, tower, worn)
    assert cache.features.shape == (16, 2, 3, 32)
    keys, views = batches[1].keys[:3], [2, 0, 1]
    for side, images in enumerate((batches[1].chosen, batches[1].rejected)):
        expected = tower(worn(images[:3], keys, views))
        assert torch.allclose(cache.get(keys, views)[:, side], expected, atol=1e-6)
    cache.save(tmp_path / "f.safetensors")
    loaded = FeatureCache.load(tmp_path / "f.safetensors")
    assert loaded is not None
    assert loaded.rows == cache.rows
    assert torch.equal(loaded.features, cache.features)


def test_what_cannot_be_read_is_computed_again(tmp_path: Path):
    assert FeatureCache.load(tmp_path / "absent") is None
    (tmp_path / "cut").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert FeatureCache.load(tmp_path / "cut") is None


def test_parts_of_several_ranks_make_the_whole(tiny_clip: Path, batches):
    tower = ClipTower(str(tiny_clip))
    whole = compute_features(batches, tower, Degradation(views=0))
    parts = [
        compute_features(part, tower, Degradation(views=0)) for part in (batches[0::2], [*batches[1::2], batches[0]])
    ]
    joined = FeatureCache.join(parts)
    keys = list(whole.rows)
    assert joined.rows.keys() == whole.rows.keys()
    assert torch.allclose(joined.get(keys, [0] * 16), whole.get(keys, [0] * 16), atol=1e-6)


def test_two_pairs_of_one_key_and_pairs_without_images_are_named(tiny_clip: Path, batches):
    tower = ClipTower(str(tiny_clip))
    first = batches[0]
    with pytest.raises(UserError, match=f"sample {first.keys[0]}: two pairs"):
        compute_features([first, replace(first, chosen=-first.chosen)], tower, Degradation(views=0))
    with pytest.raises(UserError, match=f"sample {first.keys[0]} has no images"):
        compute_features([replace(first, chosen=None, rejected=None)], tower, Degradation(views=0))
