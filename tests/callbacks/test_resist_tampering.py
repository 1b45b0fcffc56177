"""Fine-tunings that are played through: the arithmetic on a problem of one number, and what a step leaves behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_safety.__main__ import main
from lit_safety.callbacks import ResistTampering, Tampering
from lit_safety.callbacks.resist_tampering import Fight, beside, linear_layers
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import SCDPO
from lit_safety.objectives.objective import PairErrors
from tests.helpers.batches import batch_of
from tests.helpers.small_fits import small_fit


class OneNumber(nn.Module):
    """A denoiser w + a of one number each: w is frozen, a is what is trained. It predicts w + a whatever it gets."""

    def __init__(self, w: float, a: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w), requires_grad=False)
        self.a = nn.Parameter(torch.tensor(a))


class Problem:
    """Images are the number 0, wanted of a fine-tuning; the loss of a harmful pair is minus its error, so that the
    policy is to be far from them; the reference does not count."""

    device = torch.device("cpu")
    attack = None

    def __init__(self, w: float, a: float) -> None:
        self.denoiser = denoiser = OneNumber(w, a)
        self.backbone = SimpleNamespace(
            denoiser=denoiser,
            timesteps=lambda u, size: u,
            latents=lambda posterior, noise: posterior[:, 0],
            add_noise=lambda latents, noise, t: latents,
            target=lambda latents, noise, t: latents,
            predict=lambda noisy, t, given: (denoiser.w + denoiser.a).expand(len(noisy), 1, 1, 1),
        )

    def ordered(self, batch: PairBatch) -> PairBatch:
        return batch

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("a", self.denoiser.a)]

    def posterior(self, batch: PairBatch) -> Tensor:
        return torch.zeros(2 * len(batch), 2, 1, 1, 1)

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        nothing = torch.zeros(2 * len(batch), 1, 1, 1)
        return nothing, nothing, nothing, {}

    def reference_pass(self, batch: PairBatch, *noised: Any) -> Any:
        return SimpleNamespace(chosen=torch.zeros(len(batch)), rejected=torch.zeros(len(batch)))

    def errors(self, batch: PairBatch) -> PairErrors:
        error = (self.denoiser.w + self.denoiser.a).square().expand(len(batch))
        return PairErrors(error, error, error, error)

    def loss(self, errors: PairErrors, batch: PairBatch) -> Any:
        return SimpleNamespace(loss=-errors.policy_rejected)


def played(problem: Problem, batches: list[PairBatch], **kind: Any) -> Any:
    module: Any = problem
    return Fight(module, batches, Tampering(**kind), 0, list).play()


def test_two_steps_of_sgd_by_hand():
    """w + a = 2; each step of rate 0.1 on the error (w + a)^2 takes 2 to 2 - 0.1 x 4 = 1.6 and 1.6 to 1.6 - 0.1 x 3.2 =
    1.28. The loss -(w + a)^2 has the gradient -2 x 1.28 there; two of the batch's four pairs are harmful, so half."""
    problem = Problem(1.5, 0.5)
    found = played(problem, [batch_of([0, 1, 2, 3])], weights="full", optimizer="sgd", rate=0.1, steps=2)
    assert [float(one) for one in found.gradient] == pytest.approx([-2.56 / 2])
    assert (float(found.before), float(found.after)) == pytest.approx((4.0, 1.6**2))
    assert float(problem.denoiser.w) == 1.5  # as it was
    assert not problem.denoiser.w.requires_grad
    assert problem.denoiser.w.grad is None


def test_adam_by_hand():
    """Its first step is the rate itself: 2 - 0.1 = 1.9."""
    found = played(Problem(1.5, 0.5), [batch_of([0])], weights="full", rate=0.1, steps=1)
    assert [float(one) for one in found.gradient] == pytest.approx([-3.8], rel=1e-5)


def test_how_a_step_is_split_does_not_matter():
    """Also where a micro-batch has no harmful pair."""
    how = {"weights": "full", "optimizer": "sgd", "rate": 0.1, "steps": 2}
    whole = played(Problem(1.5, 0.5), [batch_of([0, 1, 2, 3])], **how)
    for parts in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]):
        found = played(Problem(1.5, 0.5), [batch_of(rows) for rows in parts], **how)
        torch.testing.assert_close(found.gradient, whole.gradient)


def test_a_lora_in_addition_is_one_on_the_fused_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4, bias=False))
    x = torch.randn(5, 3)
    with beside(network, linear_layers(network, ["0"]), 2, 7) as (down, up):
        torch.testing.assert_close(network(x), x @ network[0].weight.t())  # B is 0
        up.data.normal_()
        fused = network[0].weight + up @ down
        torch.testing.assert_close(network(x), x @ fused.t())
    torch.testing.assert_close(network(x), x @ network[0].weight.t())


# ---- in a real module


def ready(pipeline: Path) -> SCDPO:
    torch.manual_seed(0)
    module = SCDPO(str(pipeline))
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in module.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.train()


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_every_bit_is_put_back_and_harm_is_learned_in_between(tiny_pipeline: Path, weights: str):
    module = ready(tiny_pipeline)
    before = {name: value.clone() for name, value in module.backbone.denoiser.state_dict().items()}
    asked = {name: p.requires_grad for name, p in module.named_parameters()}
    kind = Tampering(weights=weights, rate=1e-2 if weights == "lora" else 1e-3, steps=6)  # type: ignore[arg-type]
    found = Fight(module, [batch_of([0, 1, 2])], kind, 3, list).play()
    assert all(torch.equal(value, before[name]) for name, value in module.backbone.denoiser.state_dict().items())
    assert {name: p.requires_grad for name, p in module.named_parameters()} == asked
    assert all(p.grad is None for p in module.parameters())
    assert [one.shape for one in found.gradient] == [p.shape for _, p in module.trainable_parameters()]
    assert sum(float(one.abs().sum()) for one in found.gradient) > 0
    assert torch.isfinite(found.after)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_real_step_is_its_parts(tiny_pipeline: Path, weights: str):
    module = ready(tiny_pipeline)
    kind = Tampering(weights=weights, optimizer="sgd", rate=0.01, steps=2)  # type: ignore[arg-type]
    whole = Fight(module, [batch_of([0, 1, 2, 3])], kind, 3, list).play().gradient
    parts = Fight(module, [batch_of([0, 1]), batch_of([2, 3])], kind, 3, list).play().gradient
    largest = max(float(one.abs().max()) for one in whole)
    assert max(float((one - other).abs().max()) for one, other in zip(whole, parts, strict=True)) < 1e-3 * largest


def test_kinds_are_drawn_by_step_and_seed():
    kinds = [[ResistTampering(seed=seed).kind(step) for step in range(40)] for seed in (0, 0, 1)]
    assert kinds[0] == kinds[1] != kinds[2]
    assert len({repr(kind) for kind in kinds[0]}) == 7
    due = [step for step in range(20) if ResistTampering(every_n_steps=5, warm_up=3).due(step)]
    assert due == [3, 8, 13, 18]


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"weight": 0.0}, {"warm_up": -1}, {"kinds": []}])
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ResistTampering(**settings)
    with pytest.raises(ValueError, match="rate"):
        Tampering(rate=0.0)


def test_a_fit_goes_on_exactly_and_its_parts_and_ranks_are_the_whole(
    tiny_pipeline: Path, pair_shards: Path, tmp_path: Path
):
    from tests.helpers.ranks import run

    callbacks = (
        "[{class_path: lit_safety.callbacks.ExportAdapter}, {class_path: lit_safety.callbacks.AtomicModelCheckpoint, "
        "init_args: {every_n_train_steps: 2, save_top_k: -1, filename: '{step}'}}, "
        "{class_path: lit_safety.callbacks.ResistTampering, init_args: {every_n_steps: 1, weight: 1.0, kinds: "
        "[{weights: full, optimizer: sgd, rate: 0.01, steps: 2}, {optimizer: sgd, rate: 0.1, steps: 2, rank: 2}]}}]"
    )
    settings = {
        "model.init_args.pretrained": tiny_pipeline, "model.init_args.lora.init_args.rank": 4,
        "model.init_args.optimizer.class_path": "torch.optim.SGD", "model.init_args.optimizer.init_args.lr": 0.05,
        "model.init_args.lr_scheduler": "null", "trainer.gradient_clip_val": "null", "trainer.limit_val_batches": 0,
        "trainer.val_check_interval": "null", "trainer.callbacks": callbacks,
    }  # fmt: skip
    found = {}

    def arguments(name: str, *more: str) -> list[str]:
        return small_fit("fit", ["scdpo.yaml"], tmp_path / name, pair_shards, settings, more)

    def keep(name: str) -> Path:
        latest = (tmp_path / name / "scdpo" / "latest").resolve()
        found[name] = load_file(latest / "adapter" / "pytorch_lora_weights.safetensors")
        return latest

    assert main(arguments("whole", "--data.init_args.batch_size", "8")) == 0
    whole = keep("whole")
    resumed = arguments("resumed", "--data.init_args.batch_size", "8")
    assert main([*resumed, "--ckpt_path", str(whole / "checkpoints" / "step=2.ckpt")]) == 0
    keep("resumed")
    assert all(torch.equal(value, found["resumed"][key]) for key, value in found["whole"].items())
    assert main(arguments("parts", "--trainer.accumulate_grad_batches", "2")) == 0
    keep("parts")
    run(arguments("ranks", "--trainer.devices", "2", "--trainer.strategy", "ddp"), tmp_path / "logs")
    keep("ranks")
    update = max(float(value.abs().max()) for key, value in found["whole"].items() if "lora_B" in key)
    for name in ("parts", "ranks"):
        apart = max(float((found[name][key] - value).abs().max()) for key, value in found["whole"].items())
        assert apart < 2e-3 * update, name
