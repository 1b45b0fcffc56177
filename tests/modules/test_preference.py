from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import SCDPO, PreferenceModule
from lit_safety.objectives import ConstrainedDPO, DiffusionDPO, DiffusionSDPO, SafetyConstrainedDPO
from tests.helpers.batches import batch_of


def module_of(folder: Path, objective=None, **settings) -> PreferenceModule:
    module = PreferenceModule(str(folder), objective or DiffusionDPO(beta=200.0), **settings)
    module.configure_model()
    return module


def moved(module: PreferenceModule) -> PreferenceModule:
    """With an adapter that is not the identity."""
    generator = torch.Generator().manual_seed(7)
    for _, parameter in module.trainable_parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return module


@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_v_pipeline"])
def test_the_margin_is_exactly_zero_at_the_start(pipeline: str, request: pytest.FixtureRequest):
    module = module_of(request.getfixturevalue(pipeline), DiffusionDPO(beta=5000.0, anchor_weight=1.0))
    output = module.loss(module.errors(batch_of([0, 1, 2])), batch_of([0, 1, 2]))
    assert (output.logs["rewards/margins"] == 0).all()
    assert (output.logs["loss/anchor"] == 0).all()
    torch.testing.assert_close(output.logs["loss/preference"], torch.full((3,), 0.6931472))


def test_errors_are_those_of_two_networks_run_apart(tiny_pipeline: Path):
    """Against the textbook: encode, noise, predict each image by itself, with and without the adapter."""
    module = moved(module_of(tiny_pipeline))
    batch = batch_of([0, 1])
    errors = module.errors(batch)
    backbone = module.backbone
    from lit_safety.adapters.lora import adapters_off
    from lit_safety.core.chance import normal

    with torch.no_grad():
        text = backbone.encode_text(batch.prompts)
        noise, latent_noise = normal(batch.seeds, "noise", (4, 8, 8)), normal(batch.seeds, "latent", (4, 8, 8))
        t = module.timesteps(batch)
        for name in ("chosen", "rejected"):
            latents = backbone.encode_images(getattr(batch, name), latent_noise)
            noisy = backbone.add_noise(latents, noise, t)
            policy = ((backbone.predict(noisy, t, text) - noise) ** 2).mean(dim=(1, 2, 3))
            with adapters_off(module._layers):
                reference = ((backbone.predict(noisy, t, text) - noise) ** 2).mean(dim=(1, 2, 3))
            torch.testing.assert_close(getattr(errors, f"policy_{name}"), policy, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(getattr(errors, f"reference_{name}"), reference, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(policy, reference, rtol=1e-3)


def test_the_overlap_of_residuals_is_that_of_two_networks_run_apart(tiny_pipeline: Path):
    """What Diffusion-SDPO asks for: with predictions p and noise n, mean((p_w - n)(p_l - n)) of each pair."""
    module = moved(module_of(tiny_pipeline, DiffusionSDPO()))
    batch = batch_of([0, 1])
    noisy, timesteps, noise, text = module.noised(batch)
    with torch.no_grad():
        chosen, rejected = (module.backbone.predict(noisy, timesteps, text) - noise).chunk(2)
    overlap = module.errors(batch).overlap
    assert overlap is not None
    torch.testing.assert_close(overlap, (chosen * rejected).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not overlap.requires_grad
    module.objective = DiffusionDPO()
    assert module.errors(batch).overlap is None


def test_a_sample_has_the_same_errors_in_every_batch(tiny_pipeline: Path):
    module = moved(module_of(tiny_pipeline))
    together = module.errors(batch_of([0, 1, 2, 3]))
    apart = [module.errors(batch_of(rows)) for rows in ([0, 1], [2, 3])]
    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
        joined = torch.cat([getattr(one, name) for one in apart])
        torch.testing.assert_close(getattr(together, name), joined, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapter_and_nothing_else(tiny_pipeline: Path):
    module = moved(module_of(tiny_pipeline))
    module.loss(module.errors(batch_of([0, 1])), batch_of([0, 1])).loss.mean().backward()
    for name, parameter in module.named_parameters():
        if ".policy." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_prompt_dropout_follows_the_sample_and_only_in_training(tiny_pipeline: Path):
    module = module_of(tiny_pipeline, prompt_dropout=0.5)
    batch = batch_of(list(range(16)))
    empty = module.backbone.encode_text([""])["encoder_hidden_states"][0]
    module.train()
    rows = module.conditioning(batch)["encoder_hidden_states"]
    dropped = [torch.allclose(row, empty, atol=1e-5) for row in rows]
    assert 2 <= sum(dropped) <= 14
    other_half = module.conditioning(batch_of(list(range(8, 16))))["encoder_hidden_states"]
    assert [torch.allclose(row, empty, atol=1e-5) for row in other_half] == dropped[8:]
    module.eval()
    assert not any(torch.allclose(row, empty, atol=1e-5) for row in module.conditioning(batch)["encoder_hidden_states"])


def test_scdpo_refuses_pairs_without_cost_and_pairs_ordered_by_cost(tiny_pipeline: Path):
    module = SCDPO(str(tiny_pipeline))
    with pytest.raises(UserError, match="sample 0000 has no cost"):
        module.labels(batch_of([0], costs=(float("nan"), 1.0)))
    with pytest.raises(UserError, match="sample 0001 is ordered by quality minus cost"):
        module.labels(batch_of([1], order="composite"))
    free = SCDPO(str(tiny_pipeline), SafetyConstrainedDPO(cost_weight=0.0))
    batch = batch_of([0], costs=(float("nan"), 1.0), order="composite")
    assert free.labels(batch).cost is batch.cost


def test_checkpoints_hold_what_is_trained_and_nothing_else(tiny_pipeline: Path):
    module = module_of(tiny_pipeline)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {name for name, _ in module.trainable_parameters()}
    other = module_of(tiny_pipeline)
    other.on_load_checkpoint(checkpoint)
    del checkpoint["state_dict"][next(iter(checkpoint["state_dict"]))]
    with pytest.raises(UserError, match="1 differ"):
        other.on_load_checkpoint(checkpoint)


def test_the_dual_variable_travels_in_the_checkpoint(tiny_pipeline: Path):
    """Limit 0, rate 0.5, expected cost 1: lambda = 1 + 0.5 * (1 - 0) = 1.5."""
    module = module_of(tiny_pipeline, ConstrainedDPO(dual=1.0, dual_rate=0.5, limit=0.0))
    module.objective.update(1.0)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = module_of(tiny_pipeline, ConstrainedDPO())
    other.on_load_checkpoint(checkpoint)
    assert other.objective.dual == 1.5
    with pytest.raises(UserError, match=r"DiffusionDPO .*dual"):
        module_of(tiny_pipeline).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="dual variable"):
        other.on_load_checkpoint({"state_dict": checkpoint["state_dict"]})


def test_a_subclass_in_a_few_lines(tiny_pipeline: Path):
    """What a researcher does: another timestep distribution, the rest as it is."""

    class OnlyHighNoise(PreferenceModule):
        def timesteps(self, batch: PairBatch) -> torch.Tensor:
            return torch.full((len(batch),), 900)

    module = OnlyHighNoise(str(tiny_pipeline), DiffusionDPO())
    module.configure_model()
    noisy, timesteps, _, _ = module.noised(batch_of([0, 1]))
    assert timesteps.tolist() == [900] * 4
    assert noisy.shape == (4, 4, 8, 8)
