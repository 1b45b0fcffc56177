import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.modules import SCDPO
from lit_safety.modules.checks import check_first_pairs, check_labels, check_orders, say_idle_anchor
from lit_safety.objectives import (
    BFPO,
    DMPO,
    DSPO,
    IPO,
    ConstrainedDPO,
    DiffusionDPO,
    DiffusionSDPO,
    FocalInverse,
    Hinge,
    RePO,
    SafetyConstrainedDPO,
)


@dataclass
class HostLists:
    """What the check may read of a batch. It has no tensors: reading one would wait for the device."""

    keys: list[str] = field(default_factory=lambda: ["a", "b"])
    orders: list[str] = field(default_factory=lambda: ["safety", "quality"])
    has_cost: list[bool] = field(default_factory=lambda: [True, True])
    has_score: list[bool] = field(default_factory=lambda: [True, True])
    has_harmful: list[bool] = field(default_factory=lambda: [True, True])


MISSING = [True, False]


@pytest.mark.parametrize(
    ("objective", "batch", "message"),
    [
        (SafetyConstrainedDPO(), HostLists(has_cost=MISSING), "sample b has no cost.*cost_weight: 0"),
        (RePO(), HostLists(has_cost=MISSING), "sample b has no cost.*penalty_weight: 0"),
        (ConstrainedDPO(dual=0.0), HostLists(has_cost=MISSING), "sample b has no cost.*choose another objective"),
        (ConstrainedDPO(), HostLists(has_score=MISSING), "sample b has no score"),
        (BFPO(), HostLists(has_harmful=MISSING), "sample b has no harmful label.*skip_unknown: true"),
        (SafetyConstrainedDPO(), HostLists(orders=["safety", "composite"]), "sample b is ordered by quality minus"),
    ],
    ids=["scdpo-cost", "repo-cost", "constrained-cost", "constrained-score", "bfpo-label", "scdpo-composite"],
)
def test_what_is_missing_is_named_with_the_way_out(objective, batch, message: str):
    with pytest.raises(UserError, match=message) as refused:
        check_labels(objective, batch)
    assert "init_args.cost_model" not in str(refused.value)  # few modules have that option
    check_labels(objective, HostLists())


@pytest.mark.parametrize(
    "objective",
    [
        DiffusionDPO(),
        IPO(),
        Hinge(),
        DiffusionSDPO(),
        DMPO(),
        DSPO(),
        FocalInverse(),
        SafetyConstrainedDPO(cost_weight=0.0),
        RePO(penalty_weight=0.0),
        BFPO(skip_unknown=True),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_an_objective_that_reads_no_labels_takes_any_pair(objective):
    check_labels(objective, HostLists(["a"], ["composite"], [False], [False], [False]))


def shards(folder: Path, orders: list[str], without: Sequence[str] = (), **more: Any) -> str:
    black = Image.new("RGB", (32, 32))
    with ShardWriter(folder, samples_per_shard=2) as writer:
        for i, order in enumerate(orders):
            about = {
                "prompt": "a gun", "prompt_kind": "harmful", "categories": ["violence"], "order": order,
                "harmful": {"chosen": False, "rejected": True}, "cost": {"chosen": -1.0, "rejected": 1.0}, **more,
            }  # fmt: skip
            about |= {"harmful": {"chosen": None, "rejected": True}} if "harmful" in without else {}
            kept = {key: value for key, value in about.items() if key == "harmful" or key not in without}
            writer.write(f"{folder.name}{i}", kept, black, black)
    return str(folder)


def trainer(folder: Path) -> Trainer:
    return Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip


def test_orders_that_hold_the_cost_are_refused_before_anything_is_loaded(tiny_pipeline: Path, tmp_path: Path):
    """Of two folders the second has 3 pairs of 5, over three shards."""
    plain = shards(tmp_path / "plain", ["safety"] * 3)
    mixed = shards(tmp_path / "mixed", ["composite", "safety", "quality", "composite", "composite"])
    module = SCDPO(str(tiny_pipeline))
    with pytest.raises(UserError) as caught:
        trainer(tmp_path).fit(module, datamodule=PreferenceDataModule([plain, mixed], batch_size=2))
    assert f"data.init_args.train: {mixed}: 3 of 5 pairs are ordered by quality minus cost" in str(caught.value)
    assert "cost_weight: 0`, or leave these pairs out with `data.init_args.orders:" in str(caught.value)
    assert "backbone" not in module._modules


def test_orders_are_looked_at_only_where_they_are_read(tmp_path: Path):
    mixed, plain = shards(tmp_path / "mixed", ["composite", "safety"]), shards(tmp_path / "plain", ["safety"] * 2)
    objective = SafetyConstrainedDPO()
    with pytest.raises(UserError, match=r"data\.init_args\.val: .*mixed: 1 of 2 pairs"):
        check_orders(objective, PreferenceDataModule(plain, val=mixed), "fit")
    check_orders(objective, PreferenceDataModule(plain, test=mixed), "fit")
    check_orders(objective, PreferenceDataModule(mixed, orders=["safety", "quality"]), "fit")
    check_orders(objective, PreferenceDataModule(plain, test=mixed), "predict")
    check_orders(SafetyConstrainedDPO(cost_weight=0.0), PreferenceDataModule(mixed), "fit")
    check_orders(objective, object(), "fit")


@pytest.mark.parametrize(
    ("objective", "without", "named"),
    [
        (SafetyConstrainedDPO(), ["cost"], ["cost", "shards score", "model.init_args.cost_model", "cost_weight: 0"]),
        (RePO(), ["cost"], ["cost", "penalty_weight: 0"]),
        (ConstrainedDPO(), [], ["score"]),
        (BFPO(), ["harmful"], ["harmful label", "skip_unknown: true"]),
    ],
    ids=lambda one: type(one).__name__,
)
def test_pairs_without_a_label_are_refused_before_a_weight_is_loaded(
    tiny_pipeline: Path, tmp_path: Path, objective, without: list[str], named: list[str]
):
    """Of two folders the second lacks it; the pair that was looked at, the folder and the ways out are named."""
    good = shards(tmp_path / "good", ["safety"] * 2, score={"chosen": 1.0, "rejected": 0.0})
    bad = shards(tmp_path / "bad", ["safety"] * 3, without)
    module = SCDPO(str(tiny_pipeline), objective)
    with pytest.raises(UserError) as caught:
        trainer(tmp_path).fit(module, datamodule=PreferenceDataModule([good, bad], batch_size=2))
    for word in (f"data.init_args.train: {bad}", "bad0", type(objective).__name__, *named):
        assert word in str(caught.value)
    assert "backbone" not in module._modules


def test_a_cost_model_stands_for_costs_and_what_needs_none_is_not_looked_at(tmp_path: Path):
    data = PreferenceDataModule(shards(tmp_path / "none", ["safety"] * 2, ["cost", "harmful"]))
    check_first_pairs(SafetyConstrainedDPO(), data, "fit", True)
    check_first_pairs(DiffusionDPO(), data, "fit", False)
    check_first_pairs(SafetyConstrainedDPO(), data, "predict", False)
    with pytest.raises(UserError, match="has no cost") as caught:
        check_first_pairs(SafetyConstrainedDPO(), data, "fit", None)
    assert "init_args.cost_model" not in str(caught.value)


def test_the_first_pair_is_the_first_that_takes_part(tmp_path: Path):
    """Filters leave out the first shard, whose pairs have no costs."""
    folder = tmp_path / "mixed"
    black = Image.new("RGB", (32, 32))
    with ShardWriter(folder, samples_per_shard=1) as writer:
        for key, order, cost in (("a", "quality", None), ("b", "safety", {"chosen": -1.0, "rejected": 1.0})):
            unknown = {"chosen": None, "rejected": None}
            about = {"prompt": "x", "prompt_kind": "clean", "order": order, "harmful": unknown}
            about |= {"cost": cost} if cost else {}
            writer.write(key, about, black, black)
    check_first_pairs(SafetyConstrainedDPO(), PreferenceDataModule(str(folder), orders=["safety"]), "fit", None)
    with pytest.raises(UserError, match="has no cost"):
        check_first_pairs(SafetyConstrainedDPO(), PreferenceDataModule(str(folder)), "fit", None)


def test_an_anchor_without_clean_pairs_is_said_to_do_nothing(tmp_path: Path):
    harmful = shards(tmp_path / "harmful", ["safety"] * 3)
    clean = shards(tmp_path / "clean", ["safety"] * 2, prompt_kind="clean", categories=[])
    anchored = DiffusionDPO(anchor_weight=20.0)

    def said(objective, data: PreferenceDataModule) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            say_idle_anchor(objective, data)
        return [str(one.message) for one in found if "anchor_weight" in str(one.message)]

    (line,) = said(anchored, PreferenceDataModule(harmful))
    assert "anchor_weight: 20" in line
    assert "3" in line
    assert "prompt_kind: clean" in line
    assert said(anchored, PreferenceDataModule([harmful, clean], kinds=["harmful"]))
    assert not said(anchored, PreferenceDataModule([harmful, clean]))
    assert not said(DiffusionDPO(), PreferenceDataModule(harmful))
    # Steps of one category leave pairs without a category out, unless they are asked for.
    assert said(anchored, PreferenceDataModule([harmful, clean], one_category=True))
    assert not said(anchored, PreferenceDataModule([harmful, clean], one_category=True, uncategorised=True))
