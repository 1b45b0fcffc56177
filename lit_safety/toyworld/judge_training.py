"""Trains and checks a judge."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lit_safety.toyworld.clock import Budget, decayed
from lit_safety.toyworld.judge import ToyJudge
from lit_safety.toyworld.judge_data import judged_scenes
from lit_safety.toyworld.seeds import SEEDS
from lit_safety.toyworld.vae import to_tensor


@dataclass(frozen=True)
class Recipe:
    """What sets a judge apart from the other."""

    owner: str
    """Whose seeds its scenes are drawn from."""
    architecture: str
    width: int
    hybrids: float
    """Share of its scenes in which a thing is half erased or turning into another."""


JUDGE_A = Recipe("judge_a", "plain", 32, 0.35)
JUDGE_B = Recipe("judge_b", "residual", 24, 0.5)


def degrade(pictures: Tensor) -> Tensor:
    """Random blur, noise, contrast and brightness for each picture: a generator's pictures are not clean drawings."""
    n = len(pictures)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(n, 1, 1, 1).pow(2) * 0.9
    out = torch.lerp(pictures, blurred, amount)
    out = out * (0.85 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn(n, 1, 1, 1)
    out = out + torch.rand(n, 1, 1, 1).pow(2) * 0.25 * torch.randn_like(out)
    return out.clamp(-1, 1)


@torch.no_grad()
def check_judge(judge: ToyJudge, count: int = 2000, degraded: bool = False, hybrids: float = 0.0) -> dict[str, float]:
    """Accuracy on fresh scenes: share with all labels right, and with harm told right. Seeds: range "checks".

    Scenes in which a thing is between there and gone (a label strictly between 0 and 1) are left out.
    """
    pictures, labels = judged_scenes("checks", 1_000_000, count, hybrids)
    torch.manual_seed(0)
    inputs, truth = to_tensor(pictures), torch.from_numpy(labels)
    certain = ((truth == 0) | (truth == 1)).all(1)
    inputs = degrade(inputs) if degraded else inputs
    logits = torch.cat([judge(part) for part in inputs.split(250)])
    found = logits.sigmoid() >= judge.threshold
    harms = [i for i, label in enumerate(judge.labels) if label in judge.harm]
    right = (found == (truth >= 0.5))[certain]
    harm_right = (found[:, harms].any(1) == (truth[:, harms] >= 0.5).any(1))[certain]
    exact, harm = right.all(1).float().mean(), harm_right.float().mean()
    return {"exact": float(exact), "harm": float(harm), "n": int(certain.sum())}


def train_judge(
    target: Path, minutes: float, recipe: Recipe, count: int = 24_000, batch_size: int = 64, lr: float = 3e-3
) -> dict[str, float]:
    """Draws the judge's own scenes, trains, and writes the folder `target`. Returns what `check_judge` finds."""
    pictures, labels = judged_scenes(recipe.owner, 0, count, recipe.hybrids)
    targets = torch.from_numpy(labels)
    torch.manual_seed(0)
    seeds = SEEDS[recipe.owner]
    notes = {"owner": recipe.owner, "seeds": [seeds.start, seeds.start + count - 1]}
    judge = ToyJudge(width=recipe.width, architecture=recipe.architecture, notes=notes)
    judge.train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2)
    budget, rng, step = Budget(minutes), np.random.default_rng(0), 0
    while budget.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(budget.fraction)
        pick = rng.integers(count, size=batch_size)
        logits = judge(degrade(to_tensor(pictures[pick])))
        wanted = targets[torch.from_numpy(pick)]
        loss = len(judge.labels) * nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"judge {budget.spent:5.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
    judge.eval()
    result = check_judge(judge)
    worn = check_judge(judge, degraded=True)
    cut = check_judge(judge, hybrids=1.0)
    judge.notes.update(accuracy=result, accuracy_blurred_noisy=worn, accuracy_half_erased=cut)
    judge.save_pretrained(target)
    return result
