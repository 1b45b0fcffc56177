"""Aspect buckets: which shape a pair gets, and batches of one shape that every split of a step agrees on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.batch import PairBatch
from lit_safety.data.reading.buckets import bucket_sizes, merged, nearest
from lit_safety.data.reading.decode import PairDecoder
from lit_safety.data.reading.loader import PairStream
from lit_safety.data.reading.order import Deal
from tests.helpers.pair_shards import metadata

WIDE, SQUARE, TALL, WIDEST = (32, 48), (32, 32), (64, 42), (32, 128)
"""Height and width of the chosen images."""
SHAPES = [WIDE, SQUARE, TALL] * 6 + [WIDEST]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 pairs in shards of 5: three shapes in turn and one image of a fourth; rejected ones are 40 x 40."""
    folder = tmp_path_factory.mktemp("buckets")
    with ShardWriter(folder, 5) as writer:
        for number, (height, width) in enumerate(SHAPES):
            images = [Image.new("RGB", size, (number, 0, 0)) for size in ((width, height), (40, 40))]
            writer.write(f"{number:05d}", metadata(number), *images)
    return folder


def data_of(folder: Path, **settings) -> PreferenceDataModule:
    options = {"resolution": 32, "aspect_buckets": True, "batch_size": 3, **settings}
    return PreferenceDataModule(train=str(folder), val=str(folder), **options)


def test_shapes_of_sdxl():
    """Sides in steps of 64 pixels, 1024 x 1024 or a little less, 1 : 4 to 4 : 1; SDXL's table is a part of them."""
    found = bucket_sizes(1024)
    assert {(1024, 1024), (960, 1088), (832, 1216), (768, 1344), (640, 1536), (512, 2048)} <= set(found)
    assert all((width, height) in found for height, width in found)
    assert all(h % 64 == w % 64 == 0 and 0.85 < h * w / 1024**2 <= 1 and max(h, w) <= 4 * min(h, w) for h, w in found)
    ratios = [h / w for h, w in found]
    assert ratios == sorted(ratios)
    assert bucket_sizes(32) == [
        (16, 64),
        (16, 56),
        (16, 48),
        (24, 40),
        (32, 32),
        (40, 24),
        (48, 16),
        (56, 16),
        (64, 16),
    ]


def test_the_most_alike_shape():
    """1000 x 1500 (height first) is 0.667; 832 / 1216 = 0.684 is nearer to it in logarithms than 768 / 1280 = 0.6."""
    buckets = bucket_sizes(1024)
    sizes = np.array([[1000, 1500], [512, 512], [10, 9000], [0, 0]])
    assert [buckets[number] for number in nearest(sizes, buckets)] == [
        (832, 1216),
        (1024, 1024),
        (512, 2048),
        (1024, 1024),
    ]


def test_small_buckets_go_into_their_neighbours():
    """A step takes 4: the 1 pair of the widest goes to the next, which has 4 then; the tallest's 2 to the square."""
    buckets = [(16, 64), (16, 48), (32, 32), (48, 16)]
    assert merged([1, 3, 9, 2], buckets, 4) == [1, 1, 2, 2]
    assert merged([1, 3, 9, 2], buckets, 1) == [0, 1, 2, 3]
    assert merged([0, 1, 0, 1], buckets, 4) == [0, 3, 2, 3]  # equally few: the first is moved


def shape(batch: PairBatch) -> tuple[int, ...]:
    assert batch.chosen is not None
    assert batch.rejected is not None
    assert batch.chosen.shape == batch.rejected.shape
    return tuple(batch.chosen.shape[2:])


def test_a_batch_is_of_one_shape_and_every_pair_gets_its_own(shards: Path):
    """6 of each shape and the widest image, whose bucket is too small for a step of 3 and joins the wide ones."""
    met: dict[str, tuple[int, ...]] = {}
    turns = []
    for batch in data_of(shards).train_dataloader():
        met |= dict.fromkeys(batch.keys, shape(batch))
        turns.append(shape(batch))
        assert batch.crops is not None
        for row, key in enumerate(batch.keys):
            height, width = SHAPES[int(key)]
            assert batch.crops[row, 0, [0, 1, 4, 5]].tolist() == [height, width, *shape(batch)]
            assert batch.crops[row, 1, [0, 1, 4, 5]].tolist() == [40, 40, *shape(batch)]
    expected = {WIDE: (24, 40), SQUARE: (32, 32), TALL: (40, 24), WIDEST: (24, 40)}
    assert all(size == expected[SHAPES[int(key)]] for key, size in met.items())
    assert len(met) == 18  # one of the seven wide ones waits for another pass
    assert Counter(turns) == {(24, 40): 2, (32, 32): 2, (40, 24): 2}
    assert turns != sorted(turns)


def test_every_split_of_a_step_sees_the_same_pairs(shards: Path):
    """Batches of 4 are two ranks of 2: the same keys, shapes and seeds, in the same order."""
    whole = list(data_of(shards, batch_size=4).train_dataloader())
    data = data_of(shards, batch_size=2)
    source, _ = data._open("train")
    ranks = []
    for rank in range(2):
        deal = Deal(2, rank, 2)
        stream = PairStream(source, data._groups("train", deal), deal, PairDecoder(0, 32))
        ranks.append(list(stream))
    assert whole
    assert len(ranks[0]) == len(ranks[1]) == len(whole)
    for one, first, second in zip(whole, *ranks, strict=True):
        assert one.keys == first.keys + second.keys
        assert one.seeds == first.seeds + second.seeds
        assert shape(one) == shape(first) == shape(second)


def test_a_resumed_pass_goes_on_with_the_same_batches(shards: Path):
    uninterrupted = [batch.keys for batch in data_of(shards).train_dataloader()]
    data = data_of(shards)
    data.load_state_dict({"epoch": 0, "consumed": 2, "signature": {}})
    assert [batch.keys for batch in data.train_dataloader()] == uninterrupted[2:]


def test_a_checkpoint_of_squares_is_not_taken_for_one_of_shapes(shards: Path):
    squares, shapes = data_of(shards, aspect_buckets=False), data_of(shards)
    shapes.position.signature = {"pairs": shapes._pairs_sha256()}
    with pytest.raises(UserError, match="in the middle of a pass"):
        shapes.load_state_dict({"epoch": 0, "consumed": 2, "signature": {"pairs": squares._pairs_sha256()}})


def test_evaluation_reads_every_pair_once(shards: Path):
    found = [key for batch in data_of(shards).val_dataloader() for key in batch.keys]
    assert sorted(found) == [f"{number:05d}" for number in range(len(SHAPES))]


def test_a_filter_holds(shards: Path):
    found = [key for batch in data_of(shards, kinds=["clean"], batch_size=1).train_dataloader() for key in batch.keys]
    assert sorted(map(int, found)) == [3, 7, 11, 15]


def test_the_cut_is_what_the_crops_say(shards: Path):
    """An image whose columns count up from 0, 48 wide and 32 high, cut to 32 x 24 (width first): it is not scaled
    below 24 / 32 = 0.75, so to 36 x 24, and (36 - 32) / 2 = 2 columns of that are cut off on its left."""
    columns = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (32, 48, 3))
    folder = shards.parent / "columns"
    with ShardWriter(folder) as writer:
        writer.write("0", metadata(0), *[Image.fromarray(np.ascontiguousarray(columns))] * 2)
    decoder = PairDecoder(seed=0)
    members = data_of(folder)._open("train")[0].open_shard(0).read(0)[1]
    pair = decoder("0", members, 0, "here", (24, 32))
    assert pair.crops is not None
    assert pair.chosen is not None
    assert pair.crops[0].tolist() == [32, 48, 0, 2, 24, 32]
    level = pair.chosen[0, 12].float()
    # Column i of the cut is centred at (i + 2 + 0.5) / 0.75 - 0.5 of the stored one.
    expected = torch.tensor([((i + 2.5) / 0.75 - 0.5) * 5 for i in range(32)])
    torch.testing.assert_close(level[2:-2], expected[2:-2], atol=2.0, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resolution": None}, "set data.init_args.resolution"),
        ({"one_category": True}, "data.init_args.one_category too: leave one of them out"),
    ],
)
def test_settings_that_do_not_go_together(shards: Path, settings: dict, words: str):
    with pytest.raises(UserError, match=words):
        data_of(shards, **settings)
