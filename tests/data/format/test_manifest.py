from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.format.manifest import Manifest, SampleClass, Shard, load_manifest, save_manifest
from tests.helpers.pair_shards import write_shards


def test_it_counts_what_the_shards_hold(shards: Path) -> None:
    counts = load_manifest(shards).counts()
    assert counts == {
        "samples": 40,
        "category": {"hate": 13, "sexual": 13, "violence": 14},
        "kind": {"clean": 10, "harmful": 30},
        "order": {"quality": 8, "safety": 32},
        "label": {"safe>harmful": 40},
    }


def test_saving_and_loading_gives_the_same(tmp_path: Path) -> None:
    manifest = Manifest(
        (Shard("a.tar", 2, 10, "00", (0, 1)), Shard("b/c.tar", 0, None, None, ())),
        (SampleClass("clean", "quality"), SampleClass("harmful", "safety", ("hate", "sexual"), "u1")),
        {"safe>harmful": 2},
        {"source": "x"},
        {"pairs": 3},
        {"model": "m", "resolution": 8},
    )
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("format",), "wids", "is not a manifest of preference shards"),
        (("version",), 3, "is of version 3; this program reads versions 1 and 2"),
        (("shardlist",), {}, "'shardlist' must be a list"),
        (("shardlist", 0, "url"), "pipe:curl evil", "'shardlist.0.url' is refused"),
        (("shardlist", 0, "url"), "/etc/passwd", "'shardlist.0.url' is refused"),
        (("shardlist", 0, "url"), "../x.tar", "'shardlist.0.url' is refused"),
        (("shardlist", 0, "url"), "a/../../x.tar", "is refused"),
        (("shardlist", 0, "url"), "http://h/x.tar", "is refused"),
        (("shardlist", 0, "url"), "x.tar\n", "is refused"),
        (("shardlist", 0, "url"), "{a,b}.tar", "is refused"),
        (("shardlist", 0, "url"), "shard-000001.tar", "lists the shard 'shard-000001.tar' 2 times"),
        (("shardlist", 0, "nsamples"), -1, "'shardlist.0.nsamples' must be"),
        (("shardlist", 0, "nsamples"), 10**12, "'shardlist.0.nsamples' must be less than or equal to 10000000"),
        (("shardlist", 0, "classes"), [0], "'shardlist.0.classes' must hold 3 numbers"),
        (("shardlist", 0, "classes"), [0, 1, 99], "names a class outside"),
        (("classes", 0, "categories"), ["x"], "'classes.0.categories' must hold categories (unknown category 'x'"),
        (("counts", "samples"), 7, "'counts' says 7 samples but its shards hold 6"),
        (("provenance",), [], "'provenance' must be an object"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, path: tuple[Any, ...], value: Any, complaint: str) -> None:
    write_shards(tmp_path, 6, 3)
    file = tmp_path / "manifest.json"
    data = json.loads(file.read_text())
    part = data
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        load_manifest(tmp_path)
    assert complaint in str(caught.value)
    assert "manifest.json" in str(caught.value)


def test_a_manifest_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    for content, complaint in ((b"{", "is not JSON"), (b"{\xff", "is not UTF-8")):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=f"manifest.json: {complaint}"):
            load_manifest(tmp_path)


def test_a_million_pairs_open_at_once(tmp_path: Path) -> None:
    """2,000 shards of 500 pairs, 21 classes mixed: opened in seconds (the aim is 2 s on an idle machine)."""
    classes = tuple(SampleClass("harmful", "safety", ("hate",), f"u{n}") for n in range(21))
    listed = tuple(n % 21 for n in range(500))
    save_manifest(
        Manifest(tuple(Shard(f"s-{n:06d}.tar", 500, 1, "0" * 64, listed) for n in range(2000)), classes), tmp_path
    )
    start = time.perf_counter()
    assert load_manifest(tmp_path).nsamples == 1_000_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["category", "kind", "order", "label"])
@pytest.mark.parametrize("older", [False, True])
def test_counts_that_are_not_those_of_the_samples_are_refused(tmp_path: Path, name: str, older: bool) -> None:
    write_shards(tmp_path, 6, 3)
    path = tmp_path / "manifest.json"
    stated = json.loads(path.read_text())
    if older:  # labels are counted and not listed
        for one in stated["classes"]:
            del one["label"]
    path.write_text(json.dumps(stated))
    load_manifest(tmp_path)
    first = min(stated["counts"][name])
    stated["counts"][name][first] += 1
    path.write_text(json.dumps(stated))
    with pytest.raises(UserError, match=rf"manifest\.json.*{name}"):
        load_manifest(tmp_path)
