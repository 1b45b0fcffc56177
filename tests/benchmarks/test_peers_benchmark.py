"""The benchmark of whole processes: the peers' arithmetic, and a run of some steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.documents import ROOT

FOLDER = ROOT / "benchmarks"


class Denoiser(nn.Module):
    """Predicts weight x noise; with its adapters off, or as a second one, 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.on = True

    def disable_adapters(self) -> None:
        self.on = False

    def enable_adapters(self) -> None:
        self.on = True

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor):
        return SimpleNamespace(sample=noisy * self.weight * self.on)


def test_the_peers_losses(monkeypatch: pytest.MonkeyPatch):
    """Latents are 0.5 x the image, noise n is 1, and x_t = latents + n, so that with weight w the error is
    (w (x_t - 0) - n)^2 and the reference's is n^2 = 1. Pair 1: images 0 and 2, x_t 1 and 2, errors for w = 0.1
    0.81 and 0.64, difference 0.17, the reference's 0. Pair 2 is pair 1 turned round: -0.17. With beta 10 the logits are
    -0.85 and 0.85. SafetyDPO: the mean of log(1 + e^0.85) and log(1 + e^-0.85); the example: -log sigmoid(0) = log 2.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    import recipes

    monkeypatch.setattr(recipes, "BETA", 10.0)
    monkeypatch.setattr(recipes.torch, "randn_like", torch.ones_like)
    images = torch.tensor([0.0, 2.0, 2.0, 0.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    vae = SimpleNamespace(
        dtype=torch.float32,
        config=SimpleNamespace(scaling_factor=0.5),
        encode=lambda one: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: one)),
    )
    schedule = SimpleNamespace(add_noise=lambda latents, noise, timesteps: latents + noise)
    text = lambda tokens, output_hidden_states: (torch.zeros(len(tokens), 1, 1),)  # noqa: E731
    found = {}
    for kind in (recipes.SafetyDPO, recipes.Example):
        policy = Denoiser(0.1)
        recipe = kind(vae, [text], policy, schedule, [policy.weight], Denoiser(0.0))
        found[kind.__name__] = recipe.train(images, torch.zeros(2, 3, dtype=torch.long))
        assert policy.on
    mean = (math.log1p(math.exp(0.85)) + math.log1p(math.exp(-0.85))) / 2
    assert found == {"SafetyDPO": pytest.approx(mean, rel=1e-5), "Example": pytest.approx(math.log(2), rel=1e-5)}


@pytest.mark.slow
def test_a_run_on_the_toy_world():
    sides = ["diffusers example", "SafetyDPO", "images"]
    options = ["--steps", "2", "--rounds", "1", "--batch_size", "2", "--sides", *sides]
    done = subprocess.run([sys.executable, str(FOLDER / "peers.py"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sides"]
    assert list(found) == sides
    for side in sides:
        assert 0 < found[side]["first step ended after, s"] < found[side]["whole process, s"]
    ours = found["images"]
    for peer in sides[:2]:
        ratio = ours[f"times as fast as {peer}"]["whole process, s"]
        assert ratio == pytest.approx(found[peer]["whole process, s"] / ours["whole process, s"], rel=0.01)
