"""Where a shard's members lie, kept next to it: no reader goes through the headers again, and nothing rests on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.format import tar_index
from lit_safety.data.format.tar_index import INDEX, OpenShard, index_tar, stored_index
from lit_safety.data.format.writer import ShardWriter

KNOWN = {"prompt_kind": "clean", "order": "quality", "harmful": {"chosen": False, "rejected": None}}


def write(folder: Path, colours: list[int], letter: str = "a") -> Path:
    """One shard of small images; shards of as many have the same size."""
    with ShardWriter(folder) as writer:
        for number, colour in enumerate(colours):
            images = [Image.new("RGB", (4, 4), (colour, 0, other)) for other in (0, 1)]
            writer.write(f"{letter}{number}", {**KNOWN, "prompt": f"{letter} {colour}", "categories": []}, *images)
    return folder / "shard-000000.tar"


def samples(path: Path, count: int) -> list[tuple[str, dict[str, bytes]]]:
    shard = OpenShard(str(path), count)
    try:
        return [shard.read(number) for number in range(count)]
    finally:
        shard.close()


def test_a_reader_does_not_go_through_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, [10, 20, 30])
    whole = samples(path, 3)
    index = index_tar(path)
    kept = stored_index(path, 3)
    assert kept is not None
    assert list(kept.samples) == list(index.samples)
    assert kept.samples[-1] == index.samples[2]
    Path(f"{path}{INDEX}").unlink()
    assert samples(path, 3) == whole

    write(tmp_path / "again", [10, 20, 30])

    def refuse(path: object) -> None:
        raise AssertionError("the headers were gone through")

    monkeypatch.setattr(tar_index, "index_tar", refuse)
    again = tmp_path / "again" / "shard-000000.tar"
    assert samples(again, 3) == whole
    shard = OpenShard(str(again), 3)
    assert shard.read_member(1, "json") == whole[1][1]["json"]
    with pytest.raises(UserError, match="has no mask"):
        shard.read_member(1, "mask.png")


def test_the_index_of_another_shard_of_the_same_size_changes_nothing(tmp_path: Path):
    first, second = write(tmp_path / "1", [10, 20], "a"), write(tmp_path / "2", [30, 40], "b")
    assert first.stat().st_size == second.stat().st_size
    expected = samples(second, 2)
    Path(f"{second}{INDEX}").write_bytes(Path(f"{first}{INDEX}").read_bytes())
    assert stored_index(second, 2) is not None
    assert samples(second, 2) == expected
    assert [key for key, _ in expected] == ["b0", "b1"]


def test_a_shard_of_another_length_or_count_is_read_by_its_headers(tmp_path: Path):
    path = write(tmp_path, [10, 20])
    assert stored_index(path, 3) is None
    path.write_bytes(path.read_bytes()[:-512])
    assert stored_index(path, 2) is None


def changed(held: dict[str, Any], name: str) -> Any:
    whole, spots = held["bytes"], held["spots"]
    wrong: dict[str, Any] = {
        "outside": {"spots": [whole, *spots[1:]]},
        "before": {"spots": [0, *spots[1:]]},
        "negative": {"spots": [spots[0], -1, *spots[2:]]},
        "huge": {"spots": [spots[0], 1 << 40, *spots[2:]]},
        "larger than any": {"spots": [1 << 80, *spots[1:]]},
        "text": {"spots": ["512", *spots[1:]]},
        "fraction": {"spots": [512.5, *spots[1:]]},
        "three": {"spots": spots[:-1]},
        "name": {"layouts": [["../x", *held["layouts"][0][1:]]]},
        "no layout": {"layout": [0, 9]},
        "layout below 0": {"layout": [0, -1]},
        "twice": {"keys": ["a0", "a0"]},
        "number": {"keys": [7, "a1"]},
        "format": {"format": "another"},
        "none": {"keys": [], "layout": [], "spots": []},
    }
    return [] if name == "list" else {**held, **wrong[name]}


WRONG = (
    *("outside", "before", "negative", "huge", "larger than any", "text", "fraction", "three", "name", "no layout"),
    *("layout below 0", "twice", "number", "format", "none", "list"),
)


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_or_hostile_index_is_left_aside(tmp_path: Path, name: str):
    path = write(tmp_path, [10, 20])
    expected = samples(path, 2)
    kept = Path(f"{path}{INDEX}")
    kept.write_text(json.dumps(changed(json.loads(kept.read_text()), name)))
    assert stored_index(path, 2) is None
    assert samples(path, 2) == expected


def test_offsets_that_are_merely_wrong_are_found_by_the_headers(tmp_path: Path):
    path = write(tmp_path, [10, 20])
    expected = samples(path, 2)
    kept = Path(f"{path}{INDEX}")
    held = json.loads(kept.read_text())
    held["spots"][::2] = [offset - 512 for offset in held["spots"][::2]]
    held["spots"][0] += 512
    kept.write_text(json.dumps(held))
    assert samples(path, 2) == expected


def test_text_that_is_no_json_is_left_aside(tmp_path: Path):
    path = write(tmp_path, [10])
    Path(f"{path}{INDEX}").write_bytes(b"\x00[" * 1000)
    assert stored_index(path, 1) is None
    assert len(samples(path, 1)) == 1


def test_writing_again_replaces_it(tmp_path: Path):
    write(tmp_path, [10, 20])
    with ShardWriter(tmp_path, overwrite=True) as writer:
        images = [Image.new("RGB", (4, 4), (1, 0, other)) for other in (0, 1)]
        writer.write("z", {**KNOWN, "prompt": "z", "categories": []}, *images)
    assert [key for key, _ in samples(tmp_path / "shard-000000.tar", 1)] == ["z"]
