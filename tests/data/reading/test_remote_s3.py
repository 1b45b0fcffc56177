"""Shards out of an S3 bucket, served by moto's server on this machine. Needs `s3fs` and `moto[server]`."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from tests.helpers.pair_shards import write_shards

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a folder of 12 pairs in 4 shards; the same lies in tmp_path/train."""
    write_shards(tmp_path / "train", 12, 3)
    monkeypatch.setenv("LIT_SAFETY_CACHE", str(tmp_path / "cache"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("shards")
    store.put(str(tmp_path / "train"), "shards/train", recursive=True)
    yield "s3://shards/train"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def keys(given: str, workers: int = 0) -> list[list[str]]:
    data = PreferenceDataModule(given, batch_size=4, num_workers=workers)
    data.setup()
    return [batch.keys for batch in data.train_dataloader()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_a_local_copy(bucket: str, tmp_path: Path, workers: int) -> None:
    assert keys(bucket, workers) == keys(str(tmp_path / "train"))


def test_a_shard_that_is_missing_or_changed_is_named(bucket: str, tmp_path: Path) -> None:
    store = s3fs.S3FileSystem()
    store.rm("shards/train/shard-000002.tar")
    with pytest.raises(UserError, match=r"s3://shards/train/shard-000002\.tar: is not there"):
        keys(bucket)
    store.put(str(tmp_path / "train" / "shard-000001.tar"), "shards/train/shard-000002.tar")
    with pytest.raises(UserError, match=r"s3://shards/train/shard-000002\.tar: is not what its manifest says"):
        keys(bucket)


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"s3://none/train/manifest\.json: "):
        keys("s3://none/train")
