"""What the stream does with good shards, and with bad and hostile ones."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data import PairBatch, PreferenceDataModule
from lit_safety.data.reading.loader import PairLoader
from tests.helpers.pair_shards import jpeg, make_image, png, png_header, sample, write_shards, write_tar


def loader(folder: Path, **options: Any) -> PairLoader:
    data = PreferenceDataModule(str(folder), **{"batch_size": 4, **options})
    data.setup()
    return data.train_dataloader()


def keys(batches: Iterator[PairBatch] | PairLoader) -> list[list[str]]:
    return [batch.keys for batch in batches]


def test_workers_do_not_change_the_stream(shards: Path) -> None:
    streams = [
        [(batch.keys, batch.seeds, batch.chosen) for batch in loader(shards, num_workers=n, flip=True)]
        for n in range(3)
    ]
    for stream in streams[1:]:
        for (names, seeds, pixels), (others, other_seeds, other_pixels) in zip(streams[0], stream, strict=True):
            assert (names, seeds) == (others, other_seeds)
            assert torch.equal(pixels, other_pixels)


def test_the_stream_can_be_sent_to_a_spawned_worker(shards: Path) -> None:
    here = loader(shards).stream.at(1, 3)
    there = pickle.loads(pickle.dumps(here))
    assert [batch.keys for batch in here] == [batch.keys for batch in there]


def test_passes_differ_and_hold_the_same_samples(shards: Path) -> None:
    both = loader(shards)
    first, second = keys(both), keys(both)
    assert len(both) == 10
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == [f"{number:05d}" for number in range(40)]


def test_a_batch_holds_what_was_written(shards: Path) -> None:
    read = next(iter(loader(shards)))
    assert read.chosen.shape == (4, 3, 8, 8)
    assert read.chosen.dtype == torch.uint8
    batch = read.to("cpu")
    assert batch.chosen.dtype == torch.float32
    for row, key in enumerate(batch.keys):
        number = int(key)
        assert batch.prompts[row] == f"prompt {number}"
        assert batch.prompt_kinds[row] == ("clean" if number % 4 == 3 else "harmful")
        assert batch.orders[row] == ("quality" if number % 5 == 4 else "safety")
        assert batch.categories[row] == (("violence", "sexual", "hate")[number % 3],)
        assert round((batch.chosen[row, 0, 0, 0].item() + 1) * 127.5) == number
        assert round((batch.rejected[row, 0, 0, 0].item() + 1) * 127.5) == number + 100
    assert batch.harmful.tolist() == [[0.0, 1.0]] * 4
    assert torch.isnan(batch.cost).all()
    assert batch.user_ids == [None] * 4


def test_evaluation_keeps_the_order_and_the_chances(shards: Path) -> None:
    data = PreferenceDataModule(val=str(shards), batch_size=4, val_batch_size=9, flip=True)
    data.setup("validate")
    passes = [list(data.val_dataloader()) for _ in range(2)]
    assert [len(batch) for batch in passes[0]] == [9, 9, 9, 9, 4]
    assert list(chain(*keys(iter(passes[0])))) == [f"{number:05d}" for number in range(40)]
    assert [batch.seeds for batch in passes[0]] == [batch.seeds for batch in passes[1]]
    assert (passes[0][0].chosen[:, 1, 0, 0] < 128).all()  # the dark half stays left: nothing is mirrored


def test_what_is_skipped_is_not_decoded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    opened: list[str] = []
    from lit_safety.data.reading import decode, source

    original, original_open = decode.parse_metadata, source.OpenShard
    monkeypatch.setattr(decode, "parse_metadata", lambda raw, where: decoded.append(where) or original(raw, where))
    monkeypatch.setattr(source, "OpenShard", lambda path, n: opened.append(path) or original_open(path, n))
    half = loader(shards)
    half.load_state_dict({"epoch": 0, "consumed": 8, "signature": {}})
    rest = keys(half)
    assert len(rest) == 2
    assert len(decoded) == 8
    assert len(opened) == 2  # the first window's four shards are not even opened
    assert rest == keys(loader(shards))[8:]


# ---- bad samples

BAD: dict[str, tuple[list[tuple[str, dict[str, bytes]]], str]] = {
    "no-rejected": ([("bad", sample(9, rejected_png=None))], "sample 'bad': lacks its rejected image"),
    "no-json": ([("bad", sample(9, json=None))], "sample 'bad': lacks its json"),
    "cut-image": (
        [("bad", sample(9, chosen_png=png(9)[:50]))],
        "sample 'bad': chosen: the PNG image cannot be decoded",
    ),
    "cut-jpeg": (
        [("bad", sample(9, chosen_png=None, chosen_jpg=jpeg(9)[:-40]))],
        "sample 'bad': chosen: the JPEG image cannot be decoded",
    ),
    "gigapixels": (
        [("bad", sample(9, rejected_png=png_header(60_000)))],
        "sample 'bad': rejected: the image is over the limit of 16777216 pixels",
    ),
    "hostile-json": ([("bad", sample(9, json=b"[" * 100_000))], "sample 'bad': the metadata is not JSON"),
    "not-utf8": ([("bad", sample(9, json=b'{"prompt": "\xff"}'))], "sample 'bad': json: is not UTF-8"),
    "empty-prompt": ([("bad", sample(9, json=b'{"prompt": ""}'))], "sample 'bad': 'prompt' must be a"),
    "key-twice": ([("0", sample(9))], "sample '0': its key is in the shard twice"),
    "member-twice": (
        [("bad", sample(9)), ("bad", {"json": b"{}"})],
        "sample 'bad': holds json twice",
    ),
}


def bad_shard(folder: Path, name: str) -> Path:
    good = [(str(number), sample(number)) for number in range(7)]
    write_tar(folder / "a.tar", [*good[:3], ("x", sample(7)), *BAD[name][0], *good[3:]])
    return folder


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_an_error_of_one_line(tmp_path: Path, name: str, workers: int) -> None:
    """Also out of a worker process, where torch would wrap a traceback round it."""
    with pytest.raises(UserError) as caught:
        keys(loader(bad_shard(tmp_path, name), num_workers=workers, batch_size=3))
    assert BAD[name][1] in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "a.tar"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_can_be_left_out_but_not_in_silence(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = PreferenceDataModule(str(bad_shard(tmp_path, name)), batch_size=3, on_bad_sample="skip", num_workers=1)
    data.setup()
    both = data.train_dataloader()
    for _ in range(2):
        batches = list(both)
        assert [len(batch) for batch in batches] == [3, 3, 3]  # a good one takes its place: ranks stay in step
        assert {key for batch in batches for key in batch.keys} == {*"0123456", "x"}
    assert len(data.bad_samples) == 1
    assert BAD[name][1] in next(iter(data.bad_samples))
    assert caplog.text.count("left out a bad sample") == 1
    data.val = data.train
    assert [len(batch) for batch in data.val_dataloader()] == [3, 2, 3]  # evaluation repeats nothing


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(str(n), sample(n, rejected_png=None if n % 2 else png(1))) for n in range(8)])
    with pytest.raises(
        UserError, match=r"3 bad samples were left out, more than data\.init_args\.bad_sample_limit = 2"
    ):
        keys(loader(tmp_path, on_bad_sample="skip", bad_sample_limit=2))


def test_a_batch_of_bad_samples_only(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(str(n), sample(n, rejected_png=None)) for n in range(4)])
    with pytest.raises(UserError, match=r"rejected image"):
        keys(loader(tmp_path, on_bad_sample="skip"))


# ---- bad shards


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "cut", "zero", "nul", "other"])
def test_a_shard_that_breaks_while_training(tmp_path: Path, damage: str, workers: int) -> None:
    write_shards(tmp_path, 24, 4)
    whole = loader(tmp_path, num_workers=workers)
    skipping = loader(tmp_path, num_workers=workers, on_bad_sample="skip")
    shard = tmp_path / "shard-000003.tar"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(data[:4000])
    elif damage == "zero":
        shard.touch()
    elif damage == "nul":
        shard.write_bytes(bytes(len(data)))
    elif damage == "other":
        shard.write_bytes((write_tar(tmp_path / "x", [("a", sample(1))])).read_bytes())
    expected = {
        "missing": "cannot be read (No such file or directory)",
        "cut": "the tar file is cut short",
        "zero": "is not a readable tar file (empty file)",
        "nul": "holds 0 samples but the manifest says 4",
        "other": "holds 1 samples but the manifest says 4",
    }[damage]
    with pytest.raises(UserError) as caught:
        keys(whole)
    assert expected in str(caught.value)
    assert str(shard) in str(caught.value)
    # Left out instead: as many batches, and only what could not be read is missing.
    batches = keys(skipping)
    assert [len(batch) for batch in batches] == [4] * 6
    lost = {f"{n:05d}" for n in range(24)} - {key for batch in batches for key in batch}
    assert lost <= {"00012", "00013", "00014", "00015"}
    assert len(skipping.bad_samples) >= len(lost) >= 2


def test_nothing_in_a_shard_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    evil = pickle.dumps(Evil())
    hostile = dict.fromkeys(("pyd", "pickle", "pth", "pt", "npy", "chosen.latent.npy", "cls", "yaml", "py"), evil)
    write_tar(tmp_path / "a.tar", [(str(n), {**hostile, **sample(n)}) for n in range(4)] + [("only", hostile)])
    batches = list(loader(tmp_path))
    assert sorted(batches[0].keys) == ["0", "1", "2", "3"]
    assert not (tmp_path / "executed").exists()


def test_links_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    import tarfile

    path = write_tar(tmp_path / "a.tar", [("0", sample(0))])
    with tarfile.open(path, "a") as tar:
        for kind, suffix in (
            (tarfile.SYMTYPE, "chosen.png"),
            (tarfile.LNKTYPE, "json"),
            (tarfile.CHRTYPE, "rejected.png"),
        ):
            info = tarfile.TarInfo(f"1.{suffix}")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(UserError, match=r"a\.tar: sample '1': .*link"):
        keys(loader(tmp_path, batch_size=1))
    found = keys(loader(tmp_path, batch_size=1, on_bad_sample="skip"))
    assert {key for batch in found for key in batch} == {"0"}


def test_sizes_that_do_not_fit_together(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0", sample(0)), ("1", sample(1, chosen_png=png(1, 16), rejected_png=png(1, 16)))])
    with pytest.raises(UserError, match=r"data\.init_args\.resolution"):
        keys(loader(tmp_path, batch_size=2))
    assert next(iter(loader(tmp_path, batch_size=2, resolution=8))).chosen.shape == (2, 3, 8, 8)
    assert make_image(0).size == (8, 8)
