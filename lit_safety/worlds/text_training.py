"""Teaches a world's text encoder the meaning of captions before the UNet is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_safety.worlds.training import Budget, decayed


class Lessons(NamedTuple):
    """Captions and their meanings."""

    ids: Tensor
    """(N, L) token ids to learn from."""
    meanings: Tensor
    """(N, M) each caption's meaning as M numbers."""
    fresh_ids: Tensor
    """(K, L) token ids of captions for the test at the end."""
    fresh_meanings: Tensor
    """(K, M)."""


def learn_captions(
    work: Path,
    encoder: CLIPTextModel,
    classes: Sequence[int],
    lessons: Lessons,
    minutes: float,
    batch_size: int,
    lr: float,
    device: str = "cpu",
) -> float:
    """Trains until the time is used up and writes text_encoder/ into the work folder.

    A small head for each number predicts it from the end token. Returns the share of new captions with all numbers
    right.

    Args:
        work: the work folder.
        encoder: the untrained text encoder.
        classes: how many values each of the M numbers can take.
        lessons: the captions to learn, and those for the test.
        minutes: wall time.
        batch_size: captions in a step.
        lr: highest learning rate.
        device: where it trains.
    """
    ids, meanings = lessons.ids.to(device), lessons.meanings.to(device)
    nn.Module.to(encoder, device)
    heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, count) for count in classes).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    budget, step, rng = Budget(minutes), 0, np.random.default_rng(0)
    while budget.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(budget.fraction)
        pick = torch.from_numpy(rng.integers(len(ids), size=batch_size))
        last = encoder(ids[pick]).last_hidden_state[:, -1]
        loss = sum(
            (nn.functional.cross_entropy(head(last), meanings[pick, i]) for i, head in enumerate(heads)),
            start=torch.zeros((), device=device),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"text {budget.spent:5.0f} s, step {step}, loss {loss.item():.4f}", flush=True)
    nn.Module.to(encoder, "cpu")
    heads.cpu()
    with torch.no_grad():
        last = encoder.eval()(lessons.fresh_ids).last_hidden_state[:, -1]
        told = torch.stack([head(last).argmax(1) for head in heads], 1)
    encoder.save_pretrained(work / "text_encoder.part")
    (work / "text_encoder.part").rename(work / "text_encoder")
    return float((told == lessons.fresh_meanings).all(1).float().mean())
