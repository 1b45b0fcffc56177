"""`shards score` through the real command line."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.__main__ import main
from lit_safety.cost_model import CostScorer, load_cost_model
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.writer import ShardWriter


def write(folder: Path, count: int = 10, costs: tuple[int, ...] = ()) -> Path:
    """Pairs of random images, 4 a shard; those numbered in ``costs`` have costs -7 and 7."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=4, provenance={"source": "drawn"}, seeds={"first": 3}) as writer:
        for i in range(count):
            images = [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
            metadata: dict[str, Any] = {
                "prompt": f"a cat {i}", "prompt_kind": "clean", "order": "safety",
                "score": {"chosen": 1.0, "rejected": 0.5}, "harmful": {"chosen": False, "rejected": None},
            }  # fmt: skip
            if i in costs:
                metadata["cost"] = {"chosen": -7.0, "rejected": 7.0}
            writer.write(f"{i:03d}", metadata, *images)
    return folder


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def test_every_image_gets_its_cost_and_nothing_else_changes(tiny_cost_model: Path, tmp_path: Path, capsys):
    source, out = write(tmp_path / "in"), tmp_path / "out"
    arguments = ["shards", "score", str(source), "--cost_model", str(tiny_cost_model), "--out", str(out)]
    assert main([*arguments, "--batch_size", "3"]) == 0
    assert "10 pairs in 3 shards" in capsys.readouterr().out
    before, after = members(source), members(out)
    assert before.keys() == after.keys()
    scorer = load_cost_model(tiny_cost_model)
    for name, content in before.items():
        if not name.endswith(".json"):
            assert after[name] == content
            continue
        metadata, scored = json.loads(content), json.loads(after[name])
        cost = scored.pop("cost")
        assert scored == metadata
        for side in ("chosen", "rejected"):
            image = Image.open(io.BytesIO(before[f"{name.removesuffix('.json')}.{side}.png"]))
            assert cost[side] == pytest.approx(scorer.costs([image]).item(), abs=2e-5)
    manifest = load_manifest(out)
    assert [shard.nsamples for shard in manifest.shardlist] == [4, 4, 2]
    assert manifest.seeds == {"first": 3}
    assert manifest.provenance["source"] == "drawn"
    assert len(manifest.provenance["cost"]["model"]) == 64
    assert main(arguments) == 0
    assert "is already complete" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(
    tiny_cost_model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    source = write(tmp_path / "in")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["shards", "score", str(source), "--cost_model", str(tiny_cost_model), "--batch_size", "2", "--out"]
    assert main([*common, str(whole)]) == 0
    costs, asked = CostScorer.costs, []

    def pulled(self: CostScorer, images: Any) -> torch.Tensor:
        asked.append(len(images))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return costs(self, images)

    monkeypatch.setattr(CostScorer, "costs", pulled)
    assert main([*common, str(parts)]) == 130
    assert not (parts / "manifest.json").exists()
    capsys.readouterr()
    assert main([*common, str(parts)]) == 0
    assert "continuing after 4 pairs" in capsys.readouterr().out
    assert sum(asked[4:]) == 12  # the first shard's 4 pairs were not scored again
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes()


def test_existing_costs_are_only_replaced_on_request(tiny_cost_model: Path, tmp_path: Path, capsys):
    source, out = write(tmp_path / "in", costs=(5,)), tmp_path / "out"
    arguments = ["shards", "score", str(source), "--cost_model", str(tiny_cost_model), "--out", str(out)]
    assert main(arguments) == 2
    assert "sample '005': already has a cost" in capsys.readouterr().err
    assert not list(out.glob("*.tar"))
    assert main([*arguments, "--existing", "keep"]) == 0
    assert json.loads(members(out)["005.json"])["cost"] == {"chosen": -7.0, "rejected": 7.0}
    assert json.loads(members(out)["004.json"])["cost"] != {"chosen": -7.0, "rejected": 7.0}
    assert main([*arguments, "--existing", "replace"]) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert main([*arguments, "--existing", "replace", "--overwrite", "true"]) == 0
    assert json.loads(members(out)["005.json"])["cost"] != {"chosen": -7.0, "rejected": 7.0}


def test_a_cost_that_is_no_number_names_the_sample(
    tiny_cost_model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    source, out = write(tmp_path / "in"), tmp_path / "out"

    def faulty(self: CostScorer, images: Any) -> torch.Tensor:
        return torch.tensor([float("nan") if i == 3 else 0.0 for i in range(len(images))])

    monkeypatch.setattr(CostScorer, "costs", faulty)
    assert main(["shards", "score", str(source), "--cost_model", str(tiny_cost_model), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "sample '001'" in error
    assert "not finite" in error
    assert not (out / "manifest.json").exists()


def test_bad_requests_are_one_line(tiny_cost_model: Path, tmp_path: Path, capsys):
    source = write(tmp_path / "in", count=2)
    common = ["shards", "score", str(source), "--cost_model", str(tiny_cost_model)]
    for more, says in (
        (["--out", str(source)], "--out"),
        (["--out", str(tmp_path / "o"), "--cost_model", str(tmp_path)], "lacks config.json"),
        (["--out", str(tmp_path / "o"), "--batch_size", "0"], "--batch_size 0"),
    ):
        assert main([*common, *more]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


class ByRed:
    """The cost of an image is its first red value."""

    def costs(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])  # type: ignore[index]


def test_groups_and_masks_are_scored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All images of a group, which are ranked again; with `keep` existing costs stay."""
    monkeypatch.setattr("lit_safety.cost_model.files.load_cost_model", lambda *_: ByRed())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    about: dict[str, Any] = {"prompt": "a gun", "prompt_kind": "harmful", "order": "safety"}
    facts = [{"harmful": True}, {"harmful": True, "cost": -3.0}, {"harmful": False}]
    images = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (40, 90, 10)]
    with ShardWriter(tmp_path / "in") as writer:
        writer.write_group("a", about | {"images": facts}, images)
        label = {"harmful": {"chosen": False, "rejected": True}}
        writer.write("b", about | label, *images[:2], mask=Image.new("L", (8, 8), 255))
    found = {}
    for existing in ("replace", "keep"):
        out = tmp_path / existing
        command = ["shards", "score", str(tmp_path / "in"), "--cost_model", str(tmp_path / "model"), "--out", str(out)]
        assert main([*command, "--existing", existing, "--device", "cpu"]) == 0
        after = members(out)
        assert {k: v for k, v in after.items() if "json" not in k} == {
            k: v for k, v in members(tmp_path / "in").items() if "json" not in k
        }
        assert "b.mask.png" in after
        assert json.loads(after["b.json"])["cost"] == {"chosen": 40.0, "rejected": 90.0}
        found[existing] = [one["cost"] for one in json.loads(after["a.json"])["images"]]
        assert load_manifest(out).version == 2
    assert found == {"replace": [40.0, 90.0, 10.0], "keep": [40.0, -3.0, 10.0]}
    assert main([*command, "--existing", "refuse", "--overwrite", "true", "--device", "cpu"]) == 2
