"""A few steps of ordinary LoRA fine-tuning on pictures and their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from lit_safety.adapters.lora import LoRA
from lit_safety.attacks.denoising import batches, denoising_loss
from lit_safety.attacks.network import Network, compute_threads
from lit_safety.attacks.pictures import Picture, encode_pictures
from lit_safety.errors import UserError
from lit_safety.evaluation.parallel import threads

if TYPE_CHECKING:
    from torch import Tensor


def train_lora(
    network: Network, pictures: Sequence[Picture], lora: LoRA, name: str, lr: float, batch_size: int, seed: int
) -> Iterator[tuple[int, float]]:
    """Train an adapter called `name` on the network, for ever; yields (steps done, loss) after each step.

    AdamW with a constant rate, plain denoising loss, each picture with its own prompt. The network's own weights,
    adapters folded in included, do not move.

    Raises:
        UserError: the loss is not finite.
    """
    backbone = network.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws the initial A from the global generator
        parameters = lora.attach(backbone.denoiser, name)
    for parameter in parameters:
        parameter.data = parameter.data.to(backbone.device)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    posterior: Tensor | None = None
    for step, rows in enumerate(batches(len(pictures), batch_size, seed), 1):
        with threads(compute_threads(network)), torch.enable_grad():
            if posterior is None:
                posterior = encode_pictures(backbone, pictures, network.resolution)
            with torch.no_grad():
                conditioning = backbone.encode_text([pictures[row].prompt for row in rows])
            keys = [pictures[row].key for row in rows]
            loss = denoising_loss(backbone, posterior[rows], conditioning, keys, seed, step).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if not torch.isfinite(loss):
            raise UserError(f"fine-tuning: the loss of step {step} is not finite; lower lr ({lr})")
        yield step, float(loss.detach())
