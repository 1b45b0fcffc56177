from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.reading.select import Filter, select
from lit_safety.data.reading.source import open_source
from tests.helpers.pair_shards import metadata, sample, write_shards, write_tar


def test_a_folder_with_a_manifest(shards: Path) -> None:
    source = open_source(str(shards), "data.train")
    assert source.manifest == load_manifest(shards)
    assert source.paths == tuple(str(shards / f"shard-{n:06d}.tar") for n in range(6))


@pytest.mark.parametrize("pattern", ["{}", "{}/shard-00000{{0..5}}.tar", "{}/shard-*.tar", "{}/shard-00000?.tar"])
def test_without_a_manifest_the_tars_are_scanned(shards: Path, tmp_path: Path, pattern: str) -> None:
    for path in shards.glob("*.tar"):
        shutil.copy(path, tmp_path)
    source = open_source(pattern.format(tmp_path), "data.train")
    known = load_manifest(shards)
    assert [shard.nsamples for shard in source.manifest.shardlist] == [7, 7, 7, 7, 7, 5]
    assert source.manifest.counts() == known.counts()
    wanted = Filter.of(["Violence"], None, None)
    assert select(source, wanted).counts == select(open_source(str(shards), ""), wanted).counts


def test_a_list_of_tars(shards: Path) -> None:
    source = open_source([str(shards / "shard-000005.tar"), str(shards / "shard-00000{0,1}.tar")], "data.train")
    assert [shard.nsamples for shard in source.manifest.shardlist] == [5, 7, 7]


def clean_json(number: int) -> bytes:
    return json.dumps(metadata(number, prompt_kind="clean")).encode()


def test_several_sources_become_one(shards: Path, tmp_path: Path) -> None:
    """One with a manifest, one without, classes numbered again: filters find what they find in each."""
    write_tar(tmp_path / "more.tar", [(f"x{n}", sample(n, json=clean_json(n))) for n in range(3)])
    source = open_source([str(tmp_path / "more.tar"), str(shards)], "data.train")
    assert [shard.nsamples for shard in source.manifest.shardlist] == [3, 7, 7, 7, 7, 7, 5]
    assert source.manifest.counts()["kind"] == {"clean": 13, "harmful": 30}
    chosen = select(source, Filter.of(["hate"], ["clean"], None))
    assert chosen.total == 3 + 1
    assert chosen.number(0, 0) == 2
    with pytest.raises(UserError, match=r"names the shard .*shard-000000\.tar 2 times"):
        open_source([str(shards), str(shards / "shard-000000.tar")], "data.train")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("{0}/none", "{0}/none does not exist; give a folder"),
        ("{0}/empty", "the folder {0}/empty holds neither manifest.json nor a tar file"),
        ("{0}/data/x-*.tar", "no file matches '{0}/data/x-*.tar'"),
        ("{0}/data/shard-00000{{0..4}}.tar", "the shard {0}/data/shard-000002.tar is missing"),
        ("", "the list of shards is empty"),
        ([], "the list of shards is empty"),
        (["{0}/data/shard-000000.tar"] * 2, "names the shard {0}/data/shard-000000.tar 2 times"),
        ("pipe:touch {0}/run", "is refused"),
        ("s3://bucket/x.tar", "give the folder that holds manifest.json"),
        ("{0}/text.tar", "is not a readable tar file"),
        ("{0}/zero.tar", "is not a readable tar file"),
        ("{0}/packed.tar.gz", "unpack it: shards are plain tar files"),
        ("{0}/cut.tar", "the tar file is cut short"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, given: str | list[str], complaint: str) -> None:
    write_shards(tmp_path / "data", 6, 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("hello " * 500)
    (tmp_path / "zero.tar").touch()
    whole = (tmp_path / "data" / "shard-000000.tar").read_bytes()
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    named = given.format(tmp_path) if isinstance(given, str) else [one.format(tmp_path) for one in given]
    with pytest.raises(UserError) as caught:
        open_source(named, "data.init_args.train")
    assert complaint.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_shard_that_the_manifest_lists_must_be_there_whole(tmp_path: Path) -> None:
    write_shards(tmp_path, 6, 3)
    shard = tmp_path / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(
        UserError, match=r"train: the shard .*shard-000001\.tar has \d+ bytes but .*manifest\.json says"
    ):
        open_source(str(tmp_path), "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train: the shard .*shard-000001\.tar is missing although .* lists it"):
        open_source(str(tmp_path), "train")


def test_a_manifest_without_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 1)
    text = (tmp_path / "manifest.json").read_text()
    start = text.index('"shardlist"')
    (tmp_path / "manifest.json").write_text(text[:start].replace('"samples": 1', '"samples": 0') + '"shardlist": []}')
    with pytest.raises(UserError, match=r"train: .*manifest\.json lists no shards"):
        open_source(str(tmp_path), "train")


def test_filters_take_what_they_say(shards: Path) -> None:
    """Of the 40: number % 4 == 3 is clean, % 5 == 4 is by quality, % 3 turns violence, sexual, hate."""
    source = open_source(str(shards), "data.train")

    def taken(*wanted: list[str] | None) -> list[int]:
        chosen = select(source, Filter.of(*wanted))
        return [s * 7 + chosen.number(s, i) for s, count in enumerate(chosen.counts) for i in range(count)]

    assert taken(None, None, None) == list(range(40))
    assert taken(["hate"], None, None) == [n for n in range(40) if n % 3 == 2]
    assert taken(["hate", "Sexuality"], ["clean"], None) == [n for n in range(40) if n % 3 and n % 4 == 3]
    assert taken(None, None, ["quality"]) == [n for n in range(40) if n % 5 == 4]


def test_a_user_s_pairs(tmp_path: Path) -> None:
    rows = [("1", {"user_id": "a"}), ("2", {"user_id": "b"}), ("3", {}), ("4", {"user_id": "a"})]
    write_tar(tmp_path / "a.tar", [(key, sample(1, json=json.dumps(metadata(1, **who)).encode())) for key, who in rows])
    source = open_source(str(tmp_path), "data.train")
    assert select(source, Filter.of(None, None, None, ["a"])).counts == (2,)
    with pytest.raises(UserError, match=r"after the filter \(users: \['c'\]\)"):
        select(source, Filter.of(None, None, None, ["c"]))


def test_filters_that_leave_nothing_say_what_there_is(shards: Path) -> None:
    with pytest.raises(UserError, match=r"categories: \['propaganda'\]"):
        select(open_source(str(shards), "data.train"), Filter.of(["propaganda"], None, None))
    with pytest.raises(UserError, match=r"data\.kinds holds 'safe'; it may hold harmful, clean"):
        Filter.of(None, ["safe"], None, key="data")
    with pytest.raises(UserError, match=r"data\.categories: unknown category 'gun'"):
        Filter.of(["gun"], None, None, key="data")
    with pytest.raises(UserError, match=r"data\.orders is an empty list"):
        Filter.of(None, None, [], key="data")


def test_a_sample_with_broken_metadata_is_found_by_no_filter(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0", sample(0)), ("1", sample(0, json=b"{")), ("2", sample(3))])
    source = open_source(str(tmp_path), "data.train")
    assert select(source, Filter()).total == 3
    assert select(source, Filter.of(["violence"], None, None)).counts == (2,)


@pytest.mark.parametrize("given", ["{0}/pipe.tar", "{0}/*.tar", "{0}", "{0}/listed", "/dev/zero", "{0}/manifest"])
def test_what_could_be_read_for_ever_is_refused_at_once(tmp_path: Path, given: str) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    write_shards(tmp_path / "listed", 2, 2)
    (tmp_path / "listed" / "shard-000000.tar").unlink()
    os.mkfifo(tmp_path / "listed" / "shard-000000.tar")
    stated = json.loads((tmp_path / "listed" / "manifest.json").read_text())
    stated["shardlist"][0].pop("bytes")
    (tmp_path / "listed" / "manifest.json").write_text(json.dumps(stated))
    (tmp_path / "manifest").mkdir()
    os.mkfifo(tmp_path / "manifest" / "manifest.json")
    with pytest.raises(UserError, match="a pipe, a device or a socket"):
        open_source(given.format(tmp_path), "train").open_shard(0)


@pytest.mark.parametrize(
    "pattern",
    [
        "shard-{000000..99999999}.tar",
        "{a..z}{a..z}{a..z}{a..z}{a..z}.tar",
        "{0..9}" * 9,
        "{a,b}" * 300,
        "{1..%s}" % ("9" * 5000),
        "{{0..9999},{0..9999}}{0..9999}",
    ],
)
def test_a_pattern_of_very_many_names_is_refused_before_they_are_made(pattern: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^train: the pattern .* over the limit of 1000000$"):
        open_source(pattern, "train")
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("pattern", ["{" * 3000 + "}" * 3000, "{" * 3000, "}{"])
def test_braces_that_lead_nowhere_are_one_line(pattern: str) -> None:
    with pytest.raises(UserError, match="train: "):
        open_source(pattern, "train")


def test_ordinary_patterns_still_name_their_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 12, 1)
    found = open_source(f"{tmp_path}/shard-{{000000..000011}}.tar", "train")
    assert len(found.paths) == 12
    assert len(open_source(f"{tmp_path}/shard-0000{{{{00..09..3}},11}}.tar", "train").paths) == 5
