"""A sample that is read is compared with what its manifest says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_safety.cli.precompute import precompute
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.manifest import SampleClass
from lit_safety.data.format.sample import parse_metadata
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.source import open_source
from lit_safety.data.validate import problems
from tests.helpers.documents import TOYWORLD
from tests.helpers.pair_shards import make_image, metadata, write_shards

SHIPPED = TOYWORLD / "shards"


def read(folder: Path, **options: Any) -> list[str]:
    data = PreferenceDataModule(str(folder), **{"batch_size": 2, **options})
    data.setup()
    return [key for batch in data.train_dataloader() for key in batch.keys]


def two_labels(folder: Path) -> Path:
    """Six pairs, two of which have two safe images."""
    with ShardWriter(folder) as writer:
        for number in range(6):
            harmful = {"chosen": False, "rejected": number < 4}
            writer.write(str(number), metadata(number, harmful=harmful), make_image(number), make_image(number + 100))
    return folder


def rewrite(folder: Path, old: bytes, new: bytes) -> None:
    """Change bytes of the shard and keep its size."""
    assert len(old) == len(new)
    shard = folder / "shard-000000.tar"
    content = shard.read_bytes()
    assert old in content
    shard.write_bytes(content.replace(old, new, 1))


def restate(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    stated = json.loads(path.read_text())
    change(stated)
    path.write_text(json.dumps(stated))


def without_labels(stated: dict[str, Any]) -> None:
    """As manifests of earlier versions are: labels are counted and not listed."""
    for one in stated["classes"]:
        del one["label"]


LABELS = (b'{"chosen": false, "rejected": true}', b'{"chosen": true, "rejected": false}')


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (*LABELS, "label"),
        (b'["violence"]', b'["shocking"]', "categories"),
        (b'"order": "safety", ', b'"order": "quality",', "order"),
    ],
)
def test_a_shard_whose_samples_were_changed_is_not_trained_on(tmp_path: Path, old: bytes, new: bytes, named: str):
    write_shards(tmp_path, 6, 6)
    rewrite(tmp_path, old, new)
    with pytest.raises(UserError, match=rf"shard-000000\.tar: sample '0000\d': its {named} is"):
        read(tmp_path, num_workers=1)
    left = read(tmp_path, on_bad_sample="skip", bad_sample_limit=20)
    assert len(left) == 6
    assert len(set(left)) == 5
    assert any(f"its {named} is" in line for line in problems(str(tmp_path)))


def test_kinds_swapped_in_the_manifest_are_noticed_under_a_filter(tmp_path: Path):
    write_shards(tmp_path, 8, 8)
    swap = {"harmful": "clean", "clean": "harmful"}
    restate(tmp_path, lambda stated: [one.update(kind=swap[one["kind"]]) for one in stated["classes"]])
    with pytest.raises(UserError, match=r"manifest\.json: 'counts' says kind"):
        read(tmp_path, num_workers=1, kinds=["harmful"])
    restate(tmp_path, lambda stated: stated["counts"].pop("kind"))
    with pytest.raises(UserError, match="its kind is 'clean', and the manifest says 'harmful'"):
        read(tmp_path, kinds=["harmful"])


def test_users_are_compared(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        for number in range(4):
            writer.write(str(number), metadata(number, user_id=f"u{number % 2}"), make_image(number), make_image(9))
    assert len(read(tmp_path)) == 4
    rewrite(tmp_path, b'"u1"', b'"u0"')
    with pytest.raises(UserError, match="its user is 'u0'"):
        read(tmp_path)


def test_an_earlier_manifest_of_one_label_is_compared_with_it(tmp_path: Path):
    write_shards(tmp_path, 6, 6)
    restate(tmp_path, without_labels)
    assert len(read(tmp_path)) == 6
    rewrite(tmp_path, *LABELS)
    with pytest.raises(UserError, match="its label is 'harmful>safe'"):
        read(tmp_path)


def test_an_earlier_manifest_of_several_labels_is_compared_by_its_shard_s_hash(tmp_path: Path):
    """Which sample has which of the labels it does not say."""
    restate(two_labels(tmp_path), without_labels)
    assert len(read(tmp_path)) == 6
    rewrite(tmp_path, b'"rejected": true}', b'"rejected":false}')
    with pytest.raises(UserError, match=r"shard-000000\.tar: is not what its manifest says"):
        read(tmp_path)


def test_a_manifest_that_lists_labels_is_read_without_hashing_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_labels(tmp_path)
    monkeypatch.setattr("lit_safety.data.reading.source.file_sha256", lambda *_, **__: pytest.fail("is hashed"))
    assert len(read(tmp_path)) == 6
    rewrite(tmp_path, b'"rejected": true}', b'"rejected":false}')
    with pytest.raises(UserError, match="its label is 'safe>safe', and the manifest says 'safe>harmful'"):
        read(tmp_path)


def test_a_cache_is_not_made_of_what_differs(tiny_pipeline: Path, tmp_path: Path):
    """Its own manifest would hide the difference."""
    write_shards(tmp_path / "pairs", 4, 4, size=32)
    rewrite(tmp_path / "pairs", *LABELS)
    with pytest.raises(UserError, match="its label is"):
        precompute(str(tmp_path / "pairs"), str(tiny_pipeline), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["train", "val", "test", "conflict", "cost_model", "onpolicy"])
def test_every_shipped_sample_is_as_its_manifest_says(name: str):
    source = open_source(str(SHIPPED / name), "folder")
    for number, listed in enumerate(source.manifest.shardlist):
        shard = source.open_shard(number)
        for sample in range(listed.nsamples):
            where = shard.where(sample)
            source.check(number, sample, parse_metadata(shard.read_member(sample, "json"), where), where)
        shard.close()


def test_labels_survive_joining_lists_of_folders(tmp_path: Path):
    two_labels(tmp_path / "one")
    write_shards(tmp_path / "two", 4, 4, first=10)
    together = open_source([str(tmp_path / "one"), str(tmp_path / "two")], "train").manifest
    assert together.states_labels
    assert {one.label for one in together.classes} == {"safe>harmful", "safe>safe"}
    assert SampleClass.of(parse_metadata(metadata(0), "x")) in together.classes
