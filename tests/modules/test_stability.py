"""What keeps a fit from running away: the guard's arithmetic, a reference that follows, noise that images came from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import PairMetadata, Sides
from lit_safety.data.reading.batch import Pair, collate
from lit_safety.modules import SCDPO, Stability
from lit_safety.modules.stability import PlainSteps
from lit_safety.modules.steadied import SteadiedSteps, check_stability, own_noise
from lit_safety.objectives import DiffusionDPO, PairErrors, PairLabels
from tests.helpers.batches import batch_of
from tests.helpers.documents import ROOT
from tests.helpers.small_fits import small_fit

SHARDS = ROOT / "data" / "toyworld" / "shards" / "val"


def errors(chosen: list[float], rejected: list[float], reference: float = 0.2) -> PairErrors:
    e_w, e_l = (torch.tensor(numbers, requires_grad=True) for numbers in (chosen, rejected))
    fixed = torch.full((len(chosen),), reference)
    return PairErrors(e_w, e_l, fixed, fixed)


def labels(count: int) -> PairLabels:
    return PairLabels(torch.zeros(count), *(torch.zeros(count, 2) for _ in range(3)))


def test_guard_golden() -> None:
    """r_w = r_l = 0.2, limit 0.05: a pair is over from 0.21. beta 100, weight 1, so the penalty is 50 (e_w - 0.21).

    Pair 1: e_w 0.21, e_l 0.3: not over (0.21 is not above). m = -50 ((0.21 - 0.2) - (0.3 - 0.2)) = 4.5, loss log(1 +
    e^-4.5) = 0.011048; d/de_w = 50 sigmoid(-4.5) = 0.549347, d/de_l = -0.549347.
    Pair 2: e_w 0.25, e_l 0.3: over by 0.04. m = -50 (0.05 - 0.1) = 2.5, loss log(1 + e^-2.5) + 50 x 0.04 = 0.078889 +
    2; d/de_w = 50 sigmoid(-2.5) + 50 = 3.792909 + 50, d/de_l = 0.
    """
    pairs = errors([0.21, 0.25], [0.3, 0.3])
    stability, objective = SteadiedSteps(Stability(winner_limit=0.05)), DiffusionDPO(beta=100.0)
    output = stability.guarded(pairs, objective(stability.spared(pairs), labels(2)), objective.beta)
    torch.testing.assert_close(output.loss.detach(), torch.tensor([0.011048, 2.078889]), rtol=0, atol=2e-6)
    assert output.logs["winner/over"].tolist() == [0.0, 1.0]
    output.loss.sum().backward()
    torch.testing.assert_close(pairs.policy_chosen.grad, torch.tensor([0.549347, 53.792909]), rtol=1e-4, atol=0)
    torch.testing.assert_close(pairs.policy_rejected.grad, torch.tensor([-0.549347, 0.0]), rtol=1e-4, atol=0)


def test_without_a_weight_the_guard_cuts_the_rejected_gradient_alone() -> None:
    """As above, pair 2: the loss is DPO's own 0.078889, d/de_w 3.792909 and d/de_l 0."""
    pairs = errors([0.25], [0.3])
    stability, objective = SteadiedSteps(Stability(winner_limit=0.05, winner_weight=0.0)), DiffusionDPO(beta=100.0)
    output = stability.guarded(pairs, objective(stability.spared(pairs), labels(1)), objective.beta)
    torch.testing.assert_close(output.loss.detach(), torch.tensor([0.078889]), rtol=0, atol=2e-6)
    output.loss.sum().backward()
    torch.testing.assert_close(pairs.policy_chosen.grad, torch.tensor([3.792909]), rtol=1e-4, atol=0)
    assert pairs.policy_rejected.grad is None or pairs.policy_rejected.grad.tolist() == [0.0]


def test_without_a_limit_errors_and_output_are_passed_on() -> None:
    pairs, stability = errors([0.9], [0.3]), PlainSteps()
    output = DiffusionDPO()(pairs, labels(1))
    assert stability.spared(pairs) is pairs
    assert stability.guarded(pairs, output, 5000.0) is output


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"winner_limit": -0.1}, "winner_limit"),
        ({"winner_weight": float("nan")}, "winner_weight"),
        ({"reference_decay": 1.0}, "reference_decay"),
        ({"reference_every": 0}, "reference_every"),
        ({"winner_limit": 0.05, "reference_decay": 0.9}, "reference_decay"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SteadiedSteps(Stability(**settings))


def moved(pipeline: Path, stability: Stability) -> SCDPO:
    torch.manual_seed(0)
    module = SCDPO(str(pipeline), objective=DiffusionDPO(beta=100.0), stability=stability)
    module.configure_model()
    return module.train()


def shift(module: SCDPO, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in module.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_reference_becomes_decay_times_itself_plus_the_rest_of_the_policy(tiny_pipeline: Path) -> None:
    """The copy begins as the policy, p0. After the move to p1 it is 0.75 p0 + 0.25 p1, then 0.75 (that) + 0.25 p2."""
    module = moved(tiny_pipeline, Stability(reference_decay=0.75))
    batch = batch_of([0, 1])
    name, parameter = module.trainable_parameters()[1]
    seen = [parameter.detach().clone()]
    assert module.errors(batch).reference_chosen.equal(module.errors(batch).policy_chosen.detach())
    expected = seen[0].clone()
    for step in (1, 2):
        shift(module, step)
        seen.append(parameter.detach().clone())
        module.steps.follow(module)
        expected = 0.75 * expected + 0.25 * seen[-1]
        torch.testing.assert_close(module.steps.state_dict()["reference"][name], expected)
    assert torch.equal(parameter.detach(), seen[-1]), "the policy itself is put back"


def test_a_decay_of_0_makes_the_reference_the_policy(tiny_pipeline: Path) -> None:
    module, batch = moved(tiny_pipeline, Stability(reference_decay=0.0)), batch_of([0, 1])
    module.errors(batch)
    shift(module, 1)
    assert not module.errors(batch).reference_chosen.equal(module.errors(batch).policy_chosen.detach())
    module.steps.follow(module)
    found = module.errors(batch)
    assert found.reference_chosen.equal(found.policy_chosen.detach())


def test_validation_compares_with_the_model_as_it_was_loaded(tiny_pipeline: Path) -> None:
    module, batch = moved(tiny_pipeline, Stability(reference_decay=0.0)), batch_of([0, 1])
    with torch.no_grad():
        before = module.errors(batch).policy_chosen
        shift(module, 1)
        module.steps.follow(module)
        assert not module.errors(batch).reference_chosen.equal(before)
        module.eval()
        assert module.errors(batch).reference_chosen.equal(before)


def test_gradients_reach_the_policy_under_autocast(tiny_pipeline: Path) -> None:
    """Autocast keeps casts of weights; those of the reference must not be used for the policy."""
    gradients = []
    for decay in (None, 0.5):
        module, batch = moved(tiny_pipeline, Stability(reference_decay=decay)), batch_of([0, 1])
        with torch.autocast("cpu", torch.bfloat16):
            found = module.errors(batch)
            (found.policy_chosen - found.policy_rejected).sum().backward()
        gradients.append([p.grad for _, p in module.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)


def weights(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(runs / "scdpo/latest/adapter/pytorch_lora_weights.safetensors")


def fit(runs: Path, settings: dict[str, Any], more: tuple[str, ...] = ()) -> None:
    from lit_safety.__main__ import main

    known = {
        "trainer.limit_val_batches": 1,
        "trainer.callbacks": '[{"class_path": "lit_safety.callbacks.ExportAdapter"}, {"class_path": '
        '"lit_safety.callbacks.AtomicModelCheckpoint", "init_args": {"save_last": true, "every_n_train_steps": 2, '
        '"save_top_k": 0}}]',
        **settings,
    }
    assert main(small_fit("fit", ["scdpo.yaml"], runs, SHARDS, known, more)) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"model.init_args.stability.reference_decay": 0.5, "model.init_args.stability.reference_every": 2},
        {"model.init_args.stability.winner_limit": 0.005},
    ],
)
def test_accumulation_and_a_resume_end_in_the_same_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Batch 4 is batch 2 accumulated twice up to rounding; 2 steps and a resume are 4 steps to the bit."""
    fit(tmp_path / "whole", settings)
    whole = weights(tmp_path / "whole")
    halves = {**settings, "data.init_args.batch_size": 2, "trainer.accumulate_grad_batches": 2}
    fit(tmp_path / "halves", {**halves, "trainer.val_check_interval": 8})
    for name, value in weights(tmp_path / "halves").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-4)
    total = {"model.init_args.lr_scheduler.init_args.total_steps": 4}
    fit(tmp_path / "parts", {**settings, **total, "trainer.max_steps": 2, "trainer.val_check_interval": 2})
    fit(tmp_path / "parts", {**settings, **total}, ("--ckpt_path", "last"))
    resumed = weights(tmp_path / "parts")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


# ---- noise that images were drawn from


def test_own_noise_is_what_the_stock_pipeline_draws_from(tiny_sd3: Path) -> None:
    """The latents that a stock pipeline gives its transformer first, of either image's seed."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["hidden_states"][-1:].clone()), with_kwargs=True
    )
    batch = batch_of([0])
    batch.origins = [(5, 6)]
    for seed in batch.origins[0] or ():
        generator = torch.Generator().manual_seed(seed)
        pipe("a cat", num_inference_steps=1, generator=generator, height=32, width=32, output_type="latent")
    assert torch.equal(own_noise(batch, tuple(seen[0].shape[1:])), torch.cat(seen))


def test_an_image_is_noised_with_its_own_noise(tiny_sd3: Path) -> None:
    """x_t = (1 - sigma) x0 + sigma noise and the target noise - x0, so x_t - sigma target is x0, and with it the noise
    target + x0: for either image the one of its seed."""
    module = SCDPO(str(tiny_sd3), objective=DiffusionDPO(), stability=Stability(own_noise=True))
    module.configure_model()
    batch = batch_of([0, 1])
    batch.origins = [(5, 6), (7, 7)]
    noisy, timesteps, target, _ = module.noised(batch)
    sigma = (timesteps / 1000).view(-1, 1, 1, 1)
    noise = target + (noisy - sigma * target)
    expected = [torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in (5, 7, 6, 7)]
    torch.testing.assert_close(noise, torch.stack(expected), rtol=0, atol=1e-5)


def pair(noise_seeds: Sides[int] | None, crops: list[int] | None = None) -> Pair:
    about = PairMetadata("a cat", "clean", noise_seeds=noise_seeds)
    image = torch.zeros(3, 8, 8)
    cut = None if crops is None else torch.tensor([crops, crops], dtype=torch.float32)
    return Pair("0001", 1, about, image, image, "shard: 0001", cut)


@pytest.mark.parametrize(
    ("one", "known"),
    [
        (pair(Sides(5, 6)), True),
        (pair(Sides(5, 6), [8, 8, 0, 0, 8, 8]), True),
        (pair(Sides(5, 6), [16, 16, 0, 0, 8, 8]), False),  # scaled
        (pair(Sides(5, 6), [8, 12, 0, 2, 8, 8]), False),  # cut
        (pair(None), False),  # by img2img, or another program
    ],
)
def test_images_without_noise_of_their_own_are_named(one: Pair, known: bool) -> None:
    batch = collate([one])
    if known:
        assert own_noise(batch, (4, 2, 2)).shape == (2, 4, 2, 2)
        return
    with pytest.raises(UserError, match=r"sample 0001.*own_noise"):
        own_noise(batch, (4, 2, 2))


def fake(pipeline: Path) -> Any:
    return SimpleNamespace(pretrained=str(pipeline), trainer=SimpleNamespace(strategy=object()))


def test_own_noise_is_refused_for_mirrored_images_and_for_models_without_straight_lines(
    tiny_sd3: Path, tiny_pipeline: Path
) -> None:
    check_stability(Stability(own_noise=True), fake(tiny_sd3), SimpleNamespace(flip=False))
    with pytest.raises(UserError, match=r"data\.init_args\.flip"):
        check_stability(Stability(own_noise=True), fake(tiny_sd3), SimpleNamespace(flip=True))
    with pytest.raises(UserError, match=r"own_noise.*StableDiffusion"):
        check_stability(Stability(own_noise=True), fake(tiny_pipeline), SimpleNamespace(flip=False))


class Cached:
    """A datamodule whose pairs come with a reference cache."""

    def caches(self, stage: str | None = "fit") -> list[Any]:
        return [SimpleNamespace(key="data.init_args.train", cache=SimpleNamespace(reference=object()))]

    orders = users = labels = training_categories = read_predictions = caches


@pytest.mark.parametrize("settings", [{"own_noise": True}, {"reference_decay": 0.9}])
def test_a_reference_cache_is_refused(tiny_sd3: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.init_args\.train.*use_reference"):
        check_stability(Stability(**settings), fake(tiny_sd3), Cached())


def test_a_moving_reference_is_refused_where_a_strategy_cuts_weights(tiny_pipeline: Path) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    module = fake(tiny_pipeline)
    module.trainer.strategy = ModelParallelStrategy()
    with pytest.raises(UserError, match=r"reference_decay.*ModelParallelStrategy"):
        check_stability(Stability(reference_decay=0.9), module, SimpleNamespace(flip=False))
