"""Groups: shards of several images a prompt, what is refused of them, and what a reader of pairs sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import parse_metadata
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.inspect import inspect
from lit_safety.data.validate import problems
from tests.helpers.pair_shards import make_image, metadata, png, sample, write_shards, write_tar

FACTS = [
    {"harmful": True, "cost": 2.0, "seed": 1},
    {"harmful": False, "cost": -1.0, "seed": 2},
    {"harmful": True, "cost": 3.0, "seed": 3},
    {"harmful": False, "cost": -2.0, "seed": 4},
]
GOOD, BAD = {"harmful": False}, {"harmful": True}


def about(number: int, facts: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    found = metadata(number, order="safety", images=FACTS if facts is None else facts) | changes
    return {name: value for name, value in found.items() if name != "harmful"}


def write_groups(folder: Path, samples: int = 4, per_shard: int = 2, size: int = 8, images: int = 4) -> Path:
    with ShardWriter(folder, per_shard, provenance={"source": "drawn"}) as writer:
        for number in range(samples):
            own = [make_image(number + 50 * place, size) for place in range(images)]
            writer.write_group(f"{number:05d}", about(number, FACTS[:images]), own)
    return folder


def group_members(**changes: Any) -> dict[str, bytes]:
    """The members of a good group; a change of None leaves one out, underscores become dots."""
    found = {"json": json.dumps(about(0)).encode(), **{f"{place}.png": png(50 * place) for place in range(4)}}
    found |= {name.replace("_", ".").lstrip("."): data for name, data in changes.items()}
    return {name: data for name, data in found.items() if data is not None}


def test_the_best_and_the_worst_are_chosen_and_rejected() -> None:
    found = parse_metadata(about(0), "here")
    assert (found.ranks, found.sides, found.names) == ((2, 1, 3, 0), (3, 2), ("0", "1", "2", "3"))
    assert (found.label, found.cost.chosen, found.cost.rejected) == ("safe>harmful", -2.0, 3.0)
    assert parse_metadata(found.to_json(), "here") == found
    assert not {"harmful", "cost", "score"} & set(found.to_dict())


@pytest.mark.parametrize(
    ("order", "facts", "ranks", "sides"),
    [
        ("safety", [BAD, GOOD, GOOD, BAD], (1, 0, 0, 1), (1, 3)),
        # a cost that is known of some decides nothing
        ("safety", [BAD | {"cost": 1.0}, BAD | {"cost": 2.0}, GOOD], (1, 1, 0), (2, 1)),
        # labels are not known: costs alone
        ("safety", [{"harmful": None, "cost": 1.0}, BAD | {"cost": 0.5}], (1, 0), (1, 0)),
        ("quality", [GOOD | {"score": 0.2}, GOOD | {"score": 0.9}], (1, 0), (1, 0)),
        ("composite", [BAD | {"score": 0.2}, GOOD | {"score": 0.2}, GOOD | {"score": 0.1}], (0, 0, 1), (0, 2)),
    ],
)
def test_ties_share_a_rank(
    order: str, facts: list[dict[str, Any]], ranks: tuple[int, ...], sides: tuple[int, int]
) -> None:
    found = parse_metadata(about(0, facts, order=order), "here")
    assert (found.ranks, found.sides) == (ranks, sides)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": []}, "2 to 64"),
        ({"images": FACTS[:1]}, "2 to 64"),
        ({"images": FACTS * 17}, "2 to 64"),
        ({"images": [{"harmful": True}, {"harmful": True}]}, "equal by safety"),
        ({"images": [{"harmful": None}, {"harmful": True}]}, "ranked by safety"),
        ({"order": "quality"}, "ranked by quality"),
        ({"images": [{"cost": 1.0}, {"harmful": True}]}, "images.0.harmful"),
        ({"images": [{"harmful": True, "cost": float("nan")}, {"harmful": False}]}, "images.0.cost"),
        ({"images": "0123"}, "images"),
        ({"images": None}, "images"),
        ({"cost": {"chosen": -1, "rejected": 1}}, "'cost'"),
        ({"harmful": {"chosen": False, "rejected": True}}, "'harmful'"),
    ],
)
def test_metadata_that_ranks_nothing_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_metadata(about(0) | changes, "here: sample 'x'")
    assert str(error.value).startswith("here: sample 'x'")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (group_members(_2_png=None), "its 2 image"),
        (group_members(_4_png=png(9)), "holds 4.png"),
        (group_members(_01_png=png(9)), "holds 01.png"),
        (group_members(_2_jpg=png(9)), "2 2 images (2.jpg, 2.png)"),
        (group_members(chosen_png=png(9)), "holds chosen.png"),
        (group_members(json=None), "its json"),
        (group_members(_2_png=b"GIF89a"), "2"),
        (sample(0) | {"json": json.dumps(about(0)).encode()}, "holds chosen.png"),
        (group_members(json=sample(0)["json"]), "its chosen image"),
    ],
)  # fmt: skip
def test_a_group_whose_members_are_not_those_it_says_is_refused(
    members: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    """By `validate`, and by a reader of pairs, in one line that names the sample."""
    write_tar(tmp_path / "a.tar", [("x", members), ("y", group_members())])
    (found,) = problems(str(tmp_path))
    assert said in found
    assert "'x'" in found
    with pytest.raises(UserError) as error:
        list(PreferenceDataModule(val=str(tmp_path), batch_size=2).val_dataloader())
    assert "'x'" in str(error.value)
    assert "\n" not in str(error.value)


def test_manifests_with_groups_are_version_2_and_pairs_stay_version_1(tmp_path: Path) -> None:
    write_groups(tmp_path / "groups")
    write_shards(tmp_path / "pairs", 3, 2)
    said = json.loads((tmp_path / "groups" / "manifest.json").read_text())
    assert (said["version"], said["counts"]["images"]) == (2, {"4": 4})
    before = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    assert before["version"] == 1
    assert "images" not in before["counts"]
    assert load_manifest(tmp_path / "groups").classes[0].images == 4
    assert problems(str(tmp_path / "groups")) == problems(str(tmp_path / "pairs")) == []


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_another_version_is_one_line(version: object, tmp_path: Path) -> None:
    """3 is to this program what 2 is to one that reads version 1."""
    folder = write_groups(tmp_path / "groups")
    said = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(said | {"version": version}))
    with pytest.raises(UserError, match="version") as error:
        load_manifest(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_manifest_that_counts_other_images_is_found(tmp_path: Path) -> None:
    write_groups(tmp_path / "four")
    write_groups(tmp_path / "three", images=3)
    shutil.copy(tmp_path / "three" / "manifest.json", tmp_path / "four")
    assert any("images" in found for found in problems(str(tmp_path / "four"), hashes=False))


def test_a_writer_takes_as_many_images_as_the_metadata_says(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(UserError, match="3 images"):
            writer.write_group("a", about(0), [make_image(0), make_image(1), make_image(2)])
        writer.write_group("a", about(0), [png(0), make_image(50), make_image(100), make_image(150)])


def test_a_stopped_writer_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    write_groups(tmp_path / "whole")

    def stopped() -> None:
        with ShardWriter(tmp_path / "cut", 2, provenance={"source": "drawn"}) as writer:
            for number in range(3):
                writer.write_group(
                    f"{number:05d}", about(number), [make_image(number + 50 * place) for place in range(4)]
                )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with ShardWriter(tmp_path / "cut", 2, provenance={"source": "drawn"}, resume=True) as writer:
        assert len(writer) == 2
        for number in range(2, 4):
            writer.write_group(f"{number:05d}", about(number), [make_image(number + 50 * place) for place in range(4)])
    for name in ("shard-000000.tar", "shard-000001.tar", "manifest.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_reader_of_pairs_and_a_reader_of_groups_see_the_same_images(tmp_path: Path) -> None:
    write_groups(tmp_path / "groups", size=16)
    write_shards(tmp_path / "pairs", 2, 2, size=16, first=10)
    given = [str(tmp_path / "groups"), str(tmp_path / "pairs")]

    def batches(whole: bool) -> list[Any]:
        data = PreferenceDataModule(val=given, batch_size=6, val_batch_size=6, resolution=8)
        data.read_groups(whole)
        return list(data.val_dataloader())

    (pairs,), (whole,) = batches(whole=False), batches(whole=True)
    assert pairs.groups is None
    assert whole.chosen is None
    groups = whole.groups
    assert groups.sizes == [4] * 4 + [2] * 2
    assert groups.ranks.tolist() == [[2, 1, 3, 0]] * 4 + [[0, 1, -1, -1]] * 2
    rows = torch.arange(6)
    assert torch.equal(groups.images[rows, groups.sides[:, 0]], pairs.chosen)
    assert torch.equal(groups.images[rows, groups.sides[:, 1]], pairs.rejected)
    assert torch.equal(groups.crops[rows, groups.sides[:, 0]], pairs.crops[:, 0])
    assert torch.equal(whole.harmful, pairs.harmful)
    assert torch.equal(groups.cost.gather(1, groups.sides).nan_to_num(9), pairs.cost.nan_to_num(9))
    assert groups.harmful[4].tolist()[:2] == [0.0, 1.0]
    assert whole.seeds == pairs.seeds
    assert torch.equal(groups.padded(groups.flat(groups.harmful)), groups.harmful.nan_to_num(0.0))
    taken = whole.take([5, 1])
    assert taken.groups.sizes == [2, 4]
    assert torch.equal(taken.groups.images[1], groups.images[1])
    assert whole.to("cpu").groups.sizes == groups.sizes


def test_inspect_says_how_many_images_groups_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(write_groups(tmp_path / "groups")), samples=1, sheet=str(tmp_path / "sheet.png"))
    said = capsys.readouterr().out
    assert "images:" in said
    assert "of 4" in said
    assert (tmp_path / "sheet.png").exists()


def test_groups_go_to_buckets_by_their_first_image(tmp_path: Path) -> None:
    from lit_safety.data.reading.buckets import chosen_sizes
    from lit_safety.data.reading.source import open_source

    with ShardWriter(tmp_path) as writer:
        writer.write_group("a", about(0), [make_image(50 * place).resize((24, 16)) for place in range(4)])
        writer.write("b", metadata(1), make_image(1), make_image(2))
    (found,) = chosen_sizes(open_source(str(tmp_path), "folder"), "key")
    assert found.tolist() == [[16, 24], [8, 8]]
