"""OSRM's beginning and MapReduce's rounds: the formulas by hand, then in real fits, and exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_safety.adapters.lora import LoRA
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.merging.experts import Expert
from lit_safety.merging.methods import mean, svd_truncate
from lit_safety.merging.options import CalibrationOptions
from lit_safety.modules import DPOExpert, ForMerging
from lit_safety.modules.for_merging import osrm_start, restart, round_ends, updates
from lit_safety.objectives import DiffusionDPO

CALIBRATION = CalibrationOptions(each=1, clean=1, steps=1, memory=1.0)


def test_osrm_by_hand():
    """Others use the first input with 4, the second with 1, the third with 9: the two least are the second and the
    first. |A| = sqrt(9 + 16 + 0 + 0 + 0 + 144) = 13, so each of the two rows is 13 / sqrt(2) long."""
    drawn = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 12.0]])
    found = osrm_start(drawn, torch.diag(torch.tensor([4.0, 1.0, 9.0])))
    length = 13 / 2**0.5
    torch.testing.assert_close(found, torch.tensor([[0.0, length, 0.0], [length, 0.0, 0.0]]))


def test_no_orthonormal_rows_hear_less_of_the_others_than_osrms():
    torch.manual_seed(0)
    x = torch.randn(6, 40, dtype=torch.float64)
    others, drawn = x @ x.T, torch.randn(2, 6, dtype=torch.float64)
    found = osrm_start(drawn, others)
    assert float(found.norm()) == pytest.approx(float(drawn.norm()))
    least = float((found @ others @ found.T).trace())
    for _ in range(20):
        rows, _ = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))
        rows = rows.T * found.norm() / 2**0.5
        assert float((rows @ others @ rows.T).trace()) >= least
    # more rows than inputs: those beyond stay as drawn; nothing of the others: all do
    wide = torch.randn(8, 6, dtype=torch.float64)
    assert torch.equal(osrm_start(wide, others)[6:], wide[6:])
    assert torch.equal(osrm_start(drawn, torch.zeros(6, 6)), drawn)


def test_restart_by_hand():
    """dW = 2 diag(3, 2, 1) cut to rank 2 is diag(6, 4, 0): of 36 + 16 + 4 the share 4 / 56 of squares is left out. Both
    factors of a direction of 6 are sqrt(6 / scale) long."""
    merged = LowRank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3), 2.0)
    found = restart(merged, torch.ones(2, 3), 2, 0.5)
    torch.testing.assert_close(found.delta(), torch.diag(torch.tensor([6.0, 4.0, 0.0], dtype=torch.float64)))
    expected = torch.tensor([12.0**0.5, 8.0**0.5], dtype=torch.float64)
    torch.testing.assert_close(found.a.norm(dim=1), expected)
    torch.testing.assert_close(found.b.norm(dim=0), expected)
    # what the merge leaves free is drawn again, with nothing in B
    wide = restart(LowRank(torch.ones(1, 3), torch.ones(3, 1)), torch.full((2, 3), 7.0), 2, 0.5)
    torch.testing.assert_close(wide.delta(), torch.ones(3, 3, dtype=torch.float64))
    assert wide.a[1].tolist() == [7.0, 7.0, 7.0]
    assert not wide.b[:, 1].any()


def test_rounds_are_equal_parts_of_the_steps():
    assert round_ends(800, 3) == [267, 534]
    assert round_ends(4, 1) == []
    assert round_ends(4, 2) == [2]


# In fits.


def weights_of(module: Any) -> dict[str, dict[str, torch.Tensor]]:
    """A copy of every expert."""
    return {name: {k: v.clone() for k, v in module.bank.weights(name).items()} for name in module.bank.names}


class Bank(Callback):
    """All experts' weights before and after the step that begins a round."""

    def __init__(self, step: int) -> None:
        self.step, self.before, self.after = step, {}, {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.before = weights_of(pl_module)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.before and not self.after:
            self.after = weights_of(pl_module)
            assert not any(one.optimizer for one in pl_module.bank._resting.values())
            assert not optimizer.state


def module_of(pipeline: Path, for_merging: ForMerging | None, **settings: Any) -> DPOExpert:
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)} | settings
    return DPOExpert(str(pipeline), DiffusionDPO(beta=200.0), for_merging=for_merging, **settings)


def fit(module: DPOExpert, shards: Path, *callbacks: Callback, resume: Path | None = None, **data: Any) -> Trainer:
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=any(
            isinstance(one, ModelCheckpoint) for one in callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
    )  # fmt: skip
    pairs = PreferenceDataModule(train=str(shards), batch_size=4, one_category=True, **data)
    trainer.fit(module, datamodule=pairs, ckpt_path=None if resume is None else str(resume))
    return trainer


def test_every_expert_goes_on_from_the_merge(tiny_pipeline: Path, category_shards: Path):
    torch.manual_seed(0)
    module, bank = module_of(tiny_pipeline, ForMerging(rounds=2, method="mean")), Bank(2)
    fit(module, category_shards, bank)
    parts = [updates(bank.before[name], "unet", module.lora) for name in ("hate", "violence")]
    lost = kept = 0.0
    for layer in parts[0]:
        whole = mean([part[layer] for part in parts], [1.0, 1.0])
        cut = svd_truncate(whole, 16)
        for name in ("hate", "violence"):
            found = updates(bank.after[name], "unet", module.lora)[layer]
            torch.testing.assert_close(found.delta(), cut.delta(), rtol=1e-4, atol=1e-8)
        kept += float(whole.delta().square().sum())
        lost += float((whole.delta() - cut.delta()).square().sum())
    assert module.for_merging is not None
    assert module.for_merging.left_out == [pytest.approx((lost / kept) ** 0.5, abs=1e-6)]
    assert module.export_settings("experts/hate")["rounds"] == 2


def test_osrm_begins_where_the_others_inputs_are_least(tiny_pipeline: Path, category_shards: Path, tmp_path: Path):
    """By Gram matrices of the base on each category's prompts, measured here by themselves."""
    from lit_safety.merging.grams import look
    from lit_safety.merging.options import Recipe
    from lit_safety.merging.own_prompts import own_prompts

    class Begun(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            self.found = getattr(self, "found", None) or weights_of(pl_module)

    torch.manual_seed(0)
    targets = {"lora": LoRA(rank=2, target_modules=["to_q"])}
    module, begun = module_of(tiny_pipeline, ForMerging(init="osrm", calibration=CALIBRATION), **targets), Begun()
    fit(module, category_shards, begun)
    names = ["hate", "violence"]
    base = load_backbone(str(tiny_pipeline))
    parts = updates(begun.found["hate"], "unet", module.lora)
    idle = [Expert(n, {k: LowRank(p.a[:0], p.b[:, :0]) for k, p in parts.items()}) for n in names]
    prompts = own_prompts(str(category_shards), names, Recipe(), CALIBRATION)
    for group in look(base, idle, prompts, Recipe(), CALIBRATION).groups:
        for layer, grams in group.items():
            for name, other in zip(names, grams.own[::-1], strict=True):
                a = updates(begun.found[name], "unet", module.lora)[layer].a.double()
                least = torch.linalg.eigvalsh(other.double())[:2].sum() * a.norm() ** 2 / 2
                assert float((a @ other.double() @ a.T).trace()) <= float(least) * 1.01 + 1e-4
                assert float(a[0].norm()) == pytest.approx(float(a[1].norm()), rel=1e-4)
                assert abs(float(a[0] @ a[1])) < 1e-3 * float(a[0].norm() ** 2)
    assert not any(v.any() for weights in begun.found.values() for k, v in weights.items() if "lora_B" in k)


@pytest.mark.slow
def test_resumed_before_at_and_after_a_merge_is_uninterrupted(
    tiny_pipeline: Path, category_shards: Path, tmp_path: Path
):
    """By OSRM and two rounds of regmean: from the first step, from where the round ends, and from after it, each with
    another global seed: to the bit."""

    def begin() -> DPOExpert:
        return module_of(tiny_pipeline, ForMerging(init="osrm", rounds=2, calibration=CALIBRATION))

    torch.manual_seed(0)
    whole = begin()
    fit(whole, category_shards, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in (1, 2, 3):
        torch.manual_seed(step)
        resumed = begin()
        fit(resumed, category_shards, resume=tmp_path / f"step={step}.ckpt")
        for name in ("hate", "violence"):
            expected = whole.bank.weights(name)
            assert all(torch.equal(value, expected[key]) for key, value in resumed.bank.weights(name).items())
        assert resumed.for_merging is not None
        assert whole.for_merging is not None
        assert resumed.for_merging.state_dict() == whole.for_merging.state_dict()


def test_what_cannot_be_is_named(tiny_pipeline: Path, category_shards: Path):
    with pytest.raises(UserError, match=r"rounds` 0"):
        ForMerging(rounds=0)
    with pytest.raises(UserError, match="one expert, hate"):
        fit(module_of(tiny_pipeline, ForMerging(rounds=2), categories=["hate"]), category_shards, categories=["hate"])
    with pytest.raises(UserError, match="consecutive: false"):
        fit(module_of(tiny_pipeline, ForMerging(rounds=2)), category_shards, consecutive=True)
