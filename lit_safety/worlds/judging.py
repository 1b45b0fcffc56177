"""How a world's judge learns from drawn scenes: the labels "present" and "two or more", and the training loop."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.training import Budget, decayed, fast_numbers

UNKNOWN = -1.0
"""The label "two or more" of a thing that is not visible enough to count."""

SAVE_EVERY = 60
"""Seconds between saved states."""
RANKED_UNTIL = 0.5
"""Share of the budget at which the weight of the loss over all labels together has fallen from 1 to 0."""


def seen(share: float) -> float:
    """The label of a thing with this visible share."""
    return float(np.clip((share - 0.3) / 0.4, 0.0, 1.0))


def degrade(images: Tensor) -> Tensor:
    """Random blur, noise, contrast and brightness for each image: a generative model's images are not clean
    drawings."""
    n = len(images)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    device = images.device
    amount = torch.rand(n, 1, 1, 1, device=device).pow(2) * 0.9
    out = torch.lerp(images, blurred, amount)
    out = out * (0.85 + 0.3 * torch.rand(n, 1, 1, 1, device=device)) + 0.1 * torch.randn(n, 1, 1, 1, device=device)
    out = out + torch.rand(n, 1, 1, 1, device=device).pow(2) * 0.25 * torch.randn_like(out)
    return out.clamp(-1, 1)


def learn(
    judge: ToyJudge,
    images: NDArray[np.uint8],
    labels: NDArray[np.float32],
    twice: NDArray[np.float32],
    minutes: float,
    batch_size: int,
    lr: float,
    state: Path | None = None,
    device: str = "cpu",
) -> None:
    """Trains a judge that counts until the time is used up; afterwards it is ready to judge.

    Args:
        judge: the judge of any world.
        images: (N, H, W, 3).
        labels: (N, L) how much of each thing is visible, in [0, 1].
        twice: (N, L) 1 for two or more of a thing, 0 for fewer, `UNKNOWN` if it cannot be seen.
        minutes: wall time.
        batch_size: images in a step.
        lr: highest learning rate.
        state: file for the training's state; an interrupted training continues from it. None: train from the start
            without saving.
        device: where it trains; afterwards the judge is on the CPU.
    """
    targets, numbers = torch.from_numpy(labels).to(device), torch.from_numpy(twice).to(device)
    shares = targets / targets.sum(1, keepdim=True).clamp(min=1e-6)
    judge.to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2)
    step, spent = 0, 0.0
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        judge.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    budget, rng = Budget(minutes, spent), np.random.default_rng(step)
    while budget.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(budget.fraction)
        pick = rng.integers(len(images), size=batch_size)
        with fast_numbers(targets.device):
            there, two = judge.told(degrade(to_tensor(images[pick], device)))
        assert two is not None
        there, two, chosen = there.float(), two.float(), torch.from_numpy(pick).to(device)
        wanted, number = targets[chosen], numbers[chosen]
        known = (number != UNKNOWN).float()
        miscounted = nn.functional.binary_cross_entropy_with_logits(two, number.clamp(min=0), known)
        loss = len(judge.labels) * (nn.functional.binary_cross_entropy_with_logits(there, wanted) + miscounted)
        # With hundreds of labels, the answer "nothing is present" is nearly right, and a judge would give it for a long
        # time.
        ranked = nn.functional.cross_entropy(there, shares[chosen])
        loss = loss + max(0.0, 1 - budget.fraction / RANKED_UNTIL) * ranked
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"judge {budget.spent:5.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
        if state is not None and (budget.spent - spent > SAVE_EVERY or budget.fraction >= 1):
            spent = budget.spent
            held = {"model": judge.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
            torch.save(held, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
    judge.cpu().eval()
