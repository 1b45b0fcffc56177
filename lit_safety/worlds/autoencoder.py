"""Trains an AutoencoderKL on a world's images, for a given wall time."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from lit_safety.worlds.training import Budget, decayed

KL_WEIGHT = 1e-3
LATENT_NOISE = 0.1
"""Noise on latents in training, in their standard deviation, so that the decoder tolerates the UNet's errors."""


def to_tensor(images: NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1] on this device, channels last."""
    tensor = torch.from_numpy(images).to(device).float().permute(0, 3, 1, 2) / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def vae_loss(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """4 MSE + L1 + KL_WEIGHT x KL (mean over latent elements), and the MSE alone."""
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    latents = latents + LATENT_NOISE * posterior.mean.detach().std() * torch.randn_like(latents)
    error = vae.decode(latents).sample - images
    kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
    mse = error.pow(2).mean()
    return 4 * mse + error.abs().mean() + KL_WEIGHT * kl, mse


def train_vae(
    work: Path,
    vae: Any,
    images: NDArray[np.uint8],
    minutes: float,
    batch_size: int = 32,
    lr: float = 2e-3,
    device: str = "cpu",
) -> None:
    """Trains until the time is used up and writes vae/ into the work folder; resumes from vae.pt.

    Args:
        work: folder for the training's state and the result.
        vae: an untrained AutoencoderKL; its scaling factor is set to 1 / standard deviation of the latents.
        images: (N, H, W, 3); may be memory-mapped.
        minutes: wall time, including earlier interrupted runs.
        batch_size: images in a step.
        lr: highest learning rate.
        device: where it trains.
    """
    vae = vae.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    state_file, step, spent = work / "vae.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    budget, saved, rng = Budget(minutes, spent), spent, np.random.default_rng(step)
    while budget.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(budget.fraction, hold=0.2)
        pick = rng.integers(len(images), size=batch_size)
        loss, mse = vae_loss(vae, to_tensor(np.asarray(images[pick]), device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"vae {budget.spent:5.0f} s, step {step}, {-10 * torch.log10(mse.detach() / 4):.2f} dB", flush=True)
        if budget.spent - saved > 60:
            saved = budget.spent
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": saved}
            torch.save(state, work / "vae.pt.part")
            (work / "vae.pt.part").rename(state_file)
    finish_vae(work, vae.cpu().eval(), np.asarray(images[:2000]))


@torch.no_grad()
def finish_vae(work: Path, vae: Any, images: NDArray[np.uint8]) -> None:
    """Sets the scaling factor so that latents have unit variance, and saves the network."""
    latents = vae.encode(to_tensor(images)).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.save_pretrained(work / "vae.part")
    (work / "vae.part").rename(work / "vae")


@torch.no_grad()
def encode_all(work: Path, images: NDArray[np.uint8], batch_size: int = 200, device: str = "cpu") -> None:
    """Writes latents.npy (N, C, h, w) float16 into the work folder: scaled posterior means of all images."""
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().to(device, memory_format=torch.channels_last)
    parts = []
    for start in range(0, len(images), batch_size):
        mean = vae.encode(to_tensor(np.asarray(images[start : start + batch_size]), device)).latent_dist.mean
        parts.append((mean * vae.config.scaling_factor).half().cpu().numpy())
    np.save(work / "latents.part.npy", np.concatenate(parts))
    (work / "latents.part.npy").rename(work / "latents.npy")
