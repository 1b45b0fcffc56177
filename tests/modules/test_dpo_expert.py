"""Experts in a real fit, in this process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.modules import DPOExpert
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
    Objective,
    RePO,
    SafetyConstrainedDPO,
)


def data_of(shards: Path, **settings: Any) -> PreferenceDataModule:
    return PreferenceDataModule(train=str(shards), batch_size=4, **{"one_category": True} | settings)


def module_of(pipeline: Path, objective: Objective | None = None, **settings: Any) -> DPOExpert:
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)} | settings
    return DPOExpert(str(pipeline), objective or DiffusionDPO(beta=200.0), **settings)


def fit(module: DPOExpert, data: PreferenceDataModule, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def weights(module: DPOExpert, name: str) -> dict[str, torch.Tensor]:
    with module.bank.shown(name):
        return module.bank.read()


class Turns(Callback):
    """Whose turn each step was, and the rate it was taken with."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(pl_module.bank.active)
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_an_expert_trained_among_others_is_the_one_trained_alone(tiny_pipeline: Path, category_shards: Path):
    """To the bit, at a constant rate: in turns, one after the other, and with accumulated batches of its category."""
    turns = Turns()
    together = module_of(tiny_pipeline)
    fit(together, data_of(category_shards), 5, turns)
    count = Counter(turns.seen)
    assert set(count) == {"hate", "violence"}
    for name, steps in count.items():
        alone = module_of(tiny_pipeline, categories=[name])
        fit(alone, data_of(category_shards, categories=[name]), steps)
        found, expected = weights(together, name), weights(alone, name)
        assert any(value.count_nonzero() for key, value in found.items() if "lora_B" in key)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert together.bank.batches == count


def test_the_schedule_is_seen_whole_by_an_expert_that_has_its_steps_in_a_row(
    tiny_pipeline: Path, category_shards: Path
):
    """A rate that falls by a tenth of itself a step over 4 steps of two experts: steps 0 and 2 of it for each."""
    turns = Turns()
    module = module_of(
        tiny_pipeline,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    fit(module, data_of(category_shards, consecutive=True), 4, turns)
    assert turns.seen == ["hate", "hate", "violence", "violence"]
    assert turns.rates == pytest.approx([1.0, 0.81, 1.0, 0.81])


@pytest.mark.slow
@pytest.mark.parametrize("consecutive", [False, True])
def test_resumed_between_accumulated_steps_is_uninterrupted(
    tiny_pipeline: Path, category_shards: Path, tmp_path: Path, consecutive: bool
):
    """Four steps of two micro-batches, or on from the end of the first phase (2) and within the second (3), each with
    another global seed: to the bit, weights, schedule and counts."""

    def begin() -> DPOExpert:
        return module_of(
            tiny_pipeline, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        )

    settings = {"max_steps": 4, "accelerator": "cpu", "logger": False, "accumulate_grad_batches": 2,
                "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    torch.manual_seed(0)
    whole = begin()
    Trainer(**settings, callbacks=[kept]).fit(whole, data_of(category_shards, consecutive=consecutive))
    for step in (2, 3):
        torch.manual_seed(step)
        resumed, turns = begin(), Turns()
        trainer = Trainer(**settings, callbacks=[turns], enable_checkpointing=False)
        data = data_of(category_shards, consecutive=consecutive)
        trainer.fit(resumed, data, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert len(turns.seen) == 4 - step
        assert resumed.bank.batches == whole.bank.batches
        for name in ("hate", "violence"):
            found, expected = weights(resumed, name), weights(whole, name)
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            assert any(value.count_nonzero() for key, value in expected.items() if "lora_B" in key)


class Count(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_costs_the_same_with_more_experts(tiny_pipeline: Path, category_shards: Path):
    """Not one operation more, from the turn's beginning to the optimizer's step; only the change of turns copies."""
    counts = []
    for names in (["violence"], ["hate", "violence", "sexual", "shocking"]):
        module = module_of(tiny_pipeline, categories=names)
        module.configure_model()
        optimizer: torch.optim.Optimizer = module.configure_optimizers()
        batch = next(iter(data_of(category_shards, categories=["violence"]).train_dataloader()))
        module.bank.activate("violence", optimizer)
        with Count() as count:
            loss = module.loss(module.errors(batch), batch).loss.mean()
            loss.backward()
            optimizer.step()
        counts.append(count.calls)
        assert sum(p.requires_grad for p in module.parameters()) == len(module.bank.parameters)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 500


def test_every_expert_starts_as_the_base(tiny_pipeline: Path, category_shards: Path):
    module = module_of(tiny_pipeline)
    module.configure_model()
    batch = next(iter(data_of(category_shards).train_dataloader()))
    for name in ("hate", "violence", "propaganda"):
        with module.bank.shown(name):
            assert (module.loss(module.errors(batch), batch).logs["rewards/margins"] == 0).all()


def test_validation_is_by_category_and_leaves_the_turn_alone(tiny_pipeline: Path, category_shards: Path):
    """Each expert is measured on its own pairs: after 2 steps of one alone, the other's margin is still exactly 0."""
    module = module_of(tiny_pipeline)
    data = data_of(category_shards, consecutive=True, val=str(category_shards))
    when = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_train_batches": 2, "max_epochs": 1}
    trainer = fit(module, data, 4, **when)
    found = trainer.callback_metrics
    assert found["val/rewards/margins/violence"] == 0.0
    assert found["val/rewards/margins/hate"] != 0.0
    assert found["val/loss"] == pytest.approx((found["val/loss/hate"] + found["val/loss/violence"]) / 2)
    assert {f"rewards/accuracies/{'hate'}", "loss/hate"} <= set(found)
    assert module.bank.active == "hate"


def test_a_category_with_too_few_pairs_is_left_out_of_training_and_validation(tiny_pipeline: Path, tmp_path: Path):
    """8 pairs about hate and 2 about violence, by 4: the fit goes on, and says once what it does not validate on."""
    with ShardWriter(tmp_path / "few") as writer:
        for number in range(10):
            about = ["hate" if number < 8 else "violence"]
            metadata = {"prompt": "a gun", "prompt_kind": "harmful", "categories": about, "order": "safety",
                        "harmful": {"chosen": False, "rejected": True}}  # fmt: skip
            writer.write(f"{number}", metadata, Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), (9, 9, 9)))
    module = module_of(tiny_pipeline)
    data = data_of(tmp_path / "few", val=str(tmp_path / "few"))
    with pytest.warns(UserWarning, match="violence") as told:
        trainer = fit(module, data, 2, val_check_interval=1, check_val_every_n_epoch=None)
    said = [str(one.message) for one in told]
    assert sum("the 2 pairs of violence are too few for a step: left out" in one for one in said) == 1
    assert sum("there is no expert of violence: its val pairs are left out" in one for one in said) == 1
    assert module.bank.names == ["hate"]
    assert "val/loss/hate" in trainer.callback_metrics
    assert "val/loss/violence" not in trainer.callback_metrics


def test_experts_do_not_change_within_a_step(tiny_pipeline: Path, category_shards: Path):
    """Turns are dealt for one micro-batch a step; two a step would add up gradients of different experts."""
    with pytest.raises(UserError, match="leave GradientAccumulationScheduler out"):
        fit(module_of(tiny_pipeline), data_of(category_shards), 8, GradientAccumulationScheduler({0: 2}))


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [
        ({"categories": ["nothing"]}, {}, "model.init_args.categories.: unknown category 'nothing'"),
        ({"categories": ["hate", "Hate"]}, {}, "name every category once"),
        ({"categories": ["hate"]}, {}, r"violence: set .data.init_args.categories. to \['hate'\]"),
        ({"categories": ["hate", "violence", "sexual"]}, {}, "model.init_args.categories.: .*sexual;"),
        ({}, {"one_category": False}, "data.init_args.one_category: true"),
        ({}, {"consecutive": True}, "multiple of 2, not 3"),
        ({}, {"one_category": False, "consecutive": True}, "set data.init_args.one_category: true"),
    ],
)
def test_what_cannot_be_trained_is_named(
    tiny_pipeline: Path, category_shards: Path, model: dict[str, Any], data: dict[str, Any], named: str
):
    with pytest.raises(UserError, match=named):
        fit(module_of(tiny_pipeline, **model), data_of(category_shards, **data), 3)


def test_pairs_without_categories_are_refused_before_a_model_is_loaded(tiny_pipeline: Path, tmp_path: Path):
    black = Image.new("RGB", (32, 32))
    with ShardWriter(tmp_path / "plain") as writer:
        for key in ("0", "1", "2", "3"):
            about = {"prompt": "x", "prompt_kind": "harmful", "order": "safety"}
            about |= {"harmful": {"chosen": False, "rejected": True}}
            writer.write(key, about, black, black)
    module = module_of(tiny_pipeline)
    with pytest.raises(UserError, match=r"data.init_args.train: no pair has `categories`"):
        fit(module, data_of(tmp_path / "plain"), 1)
    assert "backbone" not in module._modules


def test_interleaving_is_refused_under_deepspeed(
    tiny_pipeline: Path, category_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before a model is loaded; what is not refused runs under the real DeepSpeed in the tests of the command line."""
    monkeypatch.setattr("lit_safety.modules.dpo_expert.under_deepspeed", lambda trainer: True)
    with pytest.raises(UserError, match=r"2 experts .*DeepSpeed"):
        fit(module_of(tiny_pipeline), data_of(category_shards), 2)


def test_averages_over_steps_are_refused_for_several_experts(tiny_pipeline: Path, category_shards: Path):
    with pytest.raises(UserError, match="StochasticWeightAveraging would average 2 experts"):
        fit(module_of(tiny_pipeline), data_of(category_shards), 2, StochasticWeightAveraging(1e-3))


@pytest.mark.parametrize(
    "objective",
    [
        *(kind(beta=200.0) for kind in (BFPO, IPO, DiffusionSDPO, FocalInverse, Hinge, RePO, SafetyConstrainedDPO)),
        DMPO(beta=200.0, mu=0.6), DSPO(beta=0.05), DSPO(beta=0.05, mu=0.2),
    ],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_experts_learn_by_every_other_objective(tiny_pipeline: Path, category_shards: Path, objective: Objective):
    """One step: the expert whose turn it is has moved, the other has not."""
    module = module_of(tiny_pipeline, objective)
    fit(module, data_of(category_shards), 1)
    moved = {
        name: any(bool(value.count_nonzero()) for key, value in weights(module, name).items() if "lora_B" in key)
        for name in module.bank.names
    }
    assert moved == {name: name == module.bank.active for name in ("hate", "violence")}


def test_what_an_objective_learns_is_not_shared_by_experts(tiny_pipeline: Path, category_shards: Path):
    with pytest.raises(UserError, match=r"ConstrainedDPO .*dual.* 2 experts"):
        fit(module_of(tiny_pipeline, ConstrainedDPO(beta=200.0)), data_of(category_shards), 1)


def test_a_batch_of_no_category_is_refused(tiny_pipeline: Path, category_shards: Path):
    module = module_of(tiny_pipeline, categories=["hate", "violence"])
    module.configure_model()
    batch = next(iter(data_of(category_shards, one_category=False).train_dataloader()))
    with pytest.raises(UserError, match=r"category None, .*hate, violence"):
        module.category_of(batch)


def test_a_checkpoint_without_experts_is_refused(tiny_pipeline: Path):
    module = module_of(tiny_pipeline, categories=["hate"])
    module.configure_model()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    del checkpoint["experts"]
    with pytest.raises(UserError, match="not written by DPOExpert"):
        module.on_load_checkpoint(checkpoint)
