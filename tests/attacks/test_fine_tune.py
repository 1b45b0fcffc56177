from pathlib import Path

import pytest
import torch

from lit_safety.adapters.lora import LoRA
from lit_safety.attacks import FineTune, HarmlessFineTune, Recipe, StrongestFineTune
from lit_safety.attacks.lora_training import denoising_loss, encode_images, read_images, train_lora
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm


def test_the_images_are_learned_and_the_weights_below_do_not_move(make_target, pair_shards: Path) -> None:
    """The loss on the attacker's own images, at fixed noise and timesteps, is lower after 30 steps."""
    network = make_target().network()
    backbone = network.backbone
    images = read_images(str(pair_shards), 4, True, "Test")
    posterior = encode_images(backbone, images, 32)

    def error() -> float:
        with torch.no_grad():
            conditioning = backbone.encode_text([p.prompt for p in images])
            keys = [p.key for p in images]
            return sum(float(denoising_loss(backbone, posterior, conditioning, keys, 7, n).mean()) for n in range(4))

    before = error()
    frozen = {name: p.detach().clone() for name, p in backbone.denoiser.named_parameters()}
    for step, _ in train_lora(network, images, LoRA(rank=4), "attack", 1e-2, 4, seed=0):
        if step == 30:
            break
    assert error() < 0.98 * before
    after = {name.replace(".base_layer", ""): p for name, p in backbone.denoiser.named_parameters()}
    for name, parameter in frozen.items():
        assert torch.equal(after[name], parameter), name


def test_twice_the_same_to_the_bit(make_target, pair_shards: Path, tiny_adapter: Path) -> None:
    """The initial weights too come from the attack's seed, whatever was drawn before."""
    attack = FineTune(str(pair_shards), steps=[2], pictures=4, batch_size=2, rank=2)
    weights = []
    for burn in (0, 3):
        torch.rand(burn + 1)
        (stage,) = list(attack.stages(make_target(Arm(adapter=str(tiny_adapter)))))
        weights.append({n: p.detach().clone() for n, p in stage.pipe.unet.named_parameters() if "attack" in n})
    assert weights[0]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_arms_own_adapter_stays_in_the_weights(make_target, tiny_adapter: Path) -> None:
    """Opened for training, an aligned arm predicts what it predicts when it draws, and not what the base does."""
    arm = Arm(adapter=str(tiny_adapter))
    target = make_target(arm)
    noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with torch.no_grad():
        opened = target.network().backbone.denoiser(noisy, 500, text).sample
        drawn = target.pipe.unet(noisy, 500, text).sample
        base = target.base_network().backbone.denoiser(noisy, 500, text).sample
    assert torch.allclose(opened, drawn, atol=1e-5)
    assert not torch.allclose(opened, base, atol=1e-3)


def test_bad_input(make_target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lr above 0"):
        FineTune("x", lr=0)
    with pytest.raises(UserError, match="FineTune: shards"):
        FineTune(str(tmp_path / "none")).check([], [])


def test_harmless_images_are_trained_on_where_that_is_asked(make_target, pair_shards: Path, monkeypatch) -> None:
    asked: list[bool] = []

    def noted(shards, count, harmful, user, *rest, **more):
        asked.append(harmful)
        return read_images(shards, count, harmful, user, *rest, **more)

    monkeypatch.setattr("lit_safety.attacks.fine_tune.read_images", noted)
    given = {"steps": [1], "pictures": 2, "batch_size": 2}
    for attack in (FineTune(str(pair_shards), **given), HarmlessFineTune(str(pair_shards), **given)):
        assert len(list(attack.stages(make_target()))) == 1
    assert asked == [True, False]


def test_images_of_attacked_prompts_are_no_images_of_the_attacker(pair_shards: Path) -> None:
    """All harmful pairs of these shards have one prompt."""
    every = read_images(str(pair_shards), 64, True, "Test")
    assert {p.prompt for p in every} == {"a gun and a house"}
    assert len(read_images(str(pair_shards), 64, True, "Test", without={"a gun"})) == len(every)
    with pytest.raises(UserError, match="hold no"):
        read_images(str(pair_shards), 64, True, "Test", without={"a gun and a house"})


def test_a_recipe_that_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer"):
        Recipe(optimizer="LBFGS")
    with pytest.raises(UserError, match="optimizer"):
        Recipe(optimizer="Nonsense")
    with pytest.raises(UserError, match="recipes"):
        StrongestFineTune("x", [Recipe(), Recipe()])
