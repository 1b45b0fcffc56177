"""The cost model's own pairs, and the shipped model on scenes that it has not seen."""

import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_safety.cost_model import load_cost_model
from lit_safety.cost_model.metrics import cost_figures
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import parse_metadata
from lit_safety.judges.toy.objects import LOOKALIKES
from lit_safety.worlds.toyworld.cost_model import KINDS, SHIPPED, cost_pair, write_cost_shards
from lit_safety.worlds.toyworld.pairs import pairs
from lit_safety.worlds.toyworld.seeds import SEEDS
from tests.helpers.documents import TOYWORLD


def test_every_kind_meets_every_category_and_seeds_are_its_own():
    made = [cost_pair("train", index) for index in range(120)]
    assert {pair.metadata["seed"] for pair in made} <= set(range(41_000_000, 41_000_120))
    assert set(range(41_000_000, 41_000_120)) <= set(SEEDS["cost_model"])
    for kind in set(KINDS) - {"clean_quality"}:
        of = Counter(c for p in made if p.metadata["source"] == f"toyworld/{kind}" for c in p.metadata["categories"])
        assert len(of) == 8
        assert len(set(of.values())) == 1
    shown = [p.metadata["prompt"] for p in made if p.metadata["source"] == "toyworld/lookalike"]
    assert all(any(name in prompt for name in LOOKALIKES) for prompt in shown)


def test_shards_hold_labels_and_no_costs(tmp_path: Path):
    write_cost_shards(tmp_path / "some", "val", 12, processes=1)
    manifest = load_manifest(tmp_path / "some")
    assert manifest.nsamples == 12
    assert manifest.seeds == {"first": 41_500_000, "last": 41_500_011}
    with tarfile.open(tmp_path / "some" / manifest.shardlist[0].url) as tar:
        raw = [tar.extractfile(m).read() for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
    for one in raw:
        metadata = parse_metadata(one, "sample")
        assert metadata.cost is None
        assert None not in (metadata.harmful.chosen, metadata.harmful.rejected)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_shards_are_what_the_code_makes(name: str):
    part, count = SHIPPED[name]
    manifest = load_manifest(TOYWORLD / "shards" / name)
    assert manifest.nsamples == count
    with tarfile.open(TOYWORLD / "shards" / name / manifest.shardlist[0].url) as tar:
        member = next(m for m in tar if m.name.endswith(".json"))
        found = parse_metadata(tar.extractfile(member).read(), name).to_dict()  # type: ignore[union-attr]
    expected = parse_metadata(cost_pair(part, 0).metadata, name).to_dict()
    expected.pop("cost")
    assert found == expected


def test_the_shipped_model_tells_harm_from_what_looks_like_it():
    """On pairs of the test fold; whole figures are in the toy world's README."""
    scorer, labels = load_cost_model(TOYWORLD / "cost_model"), []
    drawn = list(pairs("test", 96))
    images = [image for pair in drawn for image in (pair.chosen, pair.rejected)]
    labels = [[float(pair.metadata["harmful"][side]) for side in ("chosen", "rejected")] for pair in drawn]
    about = torch.zeros(len(drawn), 8, dtype=torch.bool)
    figures = cost_figures(scorer.costs(images).view(-1, 2), torch.tensor(labels), about)
    assert figures["ranking_accuracy"] >= 0.98
    assert figures["sign_accuracy"] >= 0.92
    assert figures["auroc"] >= 0.97
