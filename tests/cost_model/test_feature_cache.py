from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.cost_model.degrade import Degradation
from lit_safety.cost_model.feature_cache import FeatureCache, cached_features, compute_features
from lit_safety.cost_model.network import ClipTower
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter


@pytest.fixture
def batches(labelled: Path):
    loader = PreferenceDataModule(test=str(labelled / "val"), val_batch_size=5).test_dataloader()
    return [batch.to("cpu") for batch in loader]


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
    with pytest.raises(UserError, match=f"sample {first.keys[0]} lacks its images"):
        compute_features([replace(first, chosen=None, rejected=None)], tower, Degradation(views=0))


def test_features_of_other_images_of_the_same_size_are_not_taken(tiny_clip: Path, tmp_path: Path):
    """Shards without a manifest, of the same name, count and size: tar files are filled up."""
    tower = ClipTower(str(tiny_clip))
    features, sizes = [], []
    for colour in ("red", "blue"):
        with ShardWriter(tmp_path / "pairs", overwrite=True) as writer:
            for number in range(2):
                about = {"prompt": "a", "prompt_kind": "clean", "order": "safety"}
                about |= {"harmful": {"chosen": False, "rejected": True}}
                writer.write(str(number), about, *(Image.new("RGB", (16, 16), colour) for _ in range(2)))
        (tmp_path / "pairs" / "manifest.json").unlink()
        sizes.append((tmp_path / "pairs" / "shard-000000.tar").stat().st_size)
        data = PreferenceDataModule(val=str(tmp_path / "pairs"), val_batch_size=2)
        trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True)
        cache = cached_features(tmp_path / "features", data, "val", tower, Degradation(views=0), trainer)
        features.append(cache.features)
    assert sizes[0] == sizes[1]
    assert not torch.equal(*features)
