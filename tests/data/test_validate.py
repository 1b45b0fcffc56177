from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data.format.manifest import Manifest, Shard, save_manifest
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.validate import problems, validate
from lit_safety.users.table import write_users
from tests.helpers.pair_shards import make_image, metadata, sample, write_shards, write_tar


def test_good_shards_are_good(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate(str(shards))
    assert capsys.readouterr().out.endswith("all 40 pairs are good\n")
    for path in shards.glob("*.tar"):  # and without a manifest
        shutil.copy(path, tmp_path)
    assert problems(str(tmp_path)) == []


def test_every_bad_sample_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(
        tmp_path / "a.tar",
        [("0", sample(0)), ("1", sample(1, rejected_png=None)), ("2", sample(2, json=b"{}")), ("3", sample(3))],
    )
    write_tar(tmp_path / "b.tar", [("3", sample(3)), ("4", sample(4, chosen_png=b"GIF89a"))])
    (tmp_path / "c.tar").touch()
    with pytest.raises(UserError, match="5 problems; 2 pairs are good"):
        validate(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    for line, words in zip(
        lines,
        [
            "a.tar: sample '1': lacks its rejected image",
            "a.tar: sample '2': 'prompt' is missing",
            "b.tar: sample '3': its key is also in",
            "b.tar: sample '4': chosen: is not a PNG",
            "c.tar: is not a readable tar file",
        ],
        strict=True,
    ):
        assert words in line


def test_what_differs_from_the_manifest_is_listed(tmp_path: Path) -> None:
    write_shards(tmp_path, 12, 3)
    one, two, three = (tmp_path / f"shard-00000{number}.tar" for number in range(3))
    one.unlink()
    data = bytearray(two.read_bytes())
    data[data.index(b"prompt 4")] = ord("P")
    two.write_bytes(data)
    three.write_bytes(three.read_bytes()[:4000])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shardlist"][3]["classes"][0] = manifest["shardlist"][0]["classes"][0]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: 'counts' says order"):
        problems(str(tmp_path))
    del manifest["counts"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = problems(str(tmp_path))
    assert [line.split(": ", 1)[1].split(" but")[0] for line in found] == [
        "is missing",
        "is not the file the manifest was made with (its SHA-256 differs)",
        "has 4000 bytes",
        "the tar file is cut short (unexpected end of data)",
        "holds 2 samples",
        "sample '00007': lacks its json",  # the cut runs through it
        "sample '00009': is SampleClass(kind='harmful', order='quality', categories=('violence',), user=None)",
    ]


def test_a_user_without_an_embedding_is_listed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number, user in enumerate(("1", "2", None)):
            writer.write(str(number), metadata(number, user_id=user), make_image(number), make_image(9))
    assert problems(str(tmp_path)) == []
    write_users(tmp_path, {"1": torch.ones(3)})
    (problem,) = problems(str(tmp_path))
    assert "sample '1': its user '2' is not in users.safetensors" in problem
    (tmp_path / "users.safetensors").write_bytes(b"no users")
    assert "users.safetensors is not a readable safetensors file" in problems(str(tmp_path))[0]


def test_no_sample_is_not_all_is_good(tmp_path: Path) -> None:
    """An empty tar, with a manifest that says so and without; a manifest of no shards."""
    write_tar(tmp_path / "a.tar", [])
    for manifest in (None, Manifest((Shard("a.tar", 0),)), Manifest(())):
        if manifest is not None:
            save_manifest(manifest, tmp_path)
        (problem,) = problems(str(tmp_path))
        assert ("manifest.json" if manifest == Manifest(()) else "a.tar: holds 0 samples") in problem
        with pytest.raises(UserError, match="1 problem; 0 pairs are good"):
            validate(str(tmp_path))


def test_a_pair_of_one_image_is_listed(tmp_path: Path) -> None:
    """By its pixels: it may be stored in two ways."""
    buffer = io.BytesIO()
    make_image(1).save(buffer, "WEBP", lossless=True)
    write_tar(
        tmp_path / "a.tar", [("0", sample(0)), ("1", sample(1, rejected_png=None, rejected_webp=buffer.getvalue()))]
    )
    (problem,) = problems(str(tmp_path))
    assert "a.tar: sample '1': chosen and rejected are the same image" in problem
