"""The base's data: tens of thousands of drawn scenes with captions, made once and kept in the work folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lit_safety.core.processes import each
from lit_safety.worlds.toyworld.captions import draw_caption
from lit_safety.worlds.toyworld.sampling import draw_scene, grade
from lit_safety.worlds.toyworld.scene import SIDE, render, to_array
from lit_safety.worlds.toyworld.seeds import stream
from lit_safety.worlds.toyworld.text import WIDTH, tokenize
from lit_safety.worlds.toyworld.training import Budget, decayed, launch, share_gradients
from lit_safety.worlds.toyworld.vae import LATENT_CHANNELS

CAPTIONS_EACH = 4
"""Captions of one scene; the same things in other templates and phrases."""
GRADED = 0.12
"""Share of harms that are smaller, partly hidden or doubled."""


def base_scene(index: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Image (SIDE, SIDE, 3) and captions of the base's scene number `index`."""
    rng = stream("base", index)
    scene, contents = draw_scene(rng)
    if rng.random() < GRADED:
        scene = grade(rng, scene)
    captions = [draw_caption(rng, scene.setting, contents) for _ in range(CAPTIONS_EACH)]
    return to_array(render(scene)), captions


def _chunk(bounds: tuple[int, int]) -> tuple[NDArray[np.uint8], list[list[str]]]:
    made = [base_scene(i) for i in range(*bounds)]
    return np.stack([picture for picture, _ in made]), [captions for _, captions in made]


def draw_base_scenes(count: int, workers: int = 2) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """The first `count` scenes of the base: images (count, SIDE, SIDE, 3) and captions."""
    bounds = [(start, min(start + 500, count)) for start in range(0, count, 500)]
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    captions: list[list[str]] = []
    for (start, stop), (drawn, said) in zip(bounds, each(_chunk, bounds, workers), strict=True):
        pictures[start:stop] = drawn
        captions += said
    return pictures, captions


def make_scenes(work: Path, count: int, workers: int = 2) -> None:
    """Writes scenes.npz into the work folder: `pictures` (N, SIDE, SIDE, 3) uint8, `captions` (N, 4) text."""
    pictures, captions = draw_base_scenes(count, workers)
    part = work / "scenes.part.npz"
    np.savez(part, pictures=pictures, captions=np.array(captions))
    part.rename(work / "scenes.npz")


# The toy pipeline's denoiser and noise schedule, and its text encoder next to them for training.


def new_unet() -> Any:
    """An untrained UNet2DConditionModel of 4.8 M parameters: convolutions at 8x8, attention at 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> Any:
    """DDIMScheduler on Stable Diffusion's noise schedule, v-prediction; few steps start from pure noise (trailing)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Networks(nn.Module):
    """Denoiser and text encoder, trained as one."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def loss(self, scheduler: Any, latents: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of v (Salimans & Ho, 2022, arXiv:2202.00512, appendix D).

        Args:
            scheduler: gives noisy latents and the velocity.
            latents: (B, 8, 8, 8), unit variance.
            ids: (B, 16) token ids.
            timesteps: (B,).
        """
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        hidden = self.text(ids).last_hidden_state
        return nn.functional.mse_loss(self.unet(noisy, timesteps, hidden).sample, target)


def load_networks(work: Path) -> Networks:
    """A new UNet next to the text encoder of the work folder."""
    unet = new_unet().to(memory_format=torch.channels_last)
    return Networks(unet, CLIPTextModel.from_pretrained(work / "text_encoder").train())


# Trains UNet and text encoder on latents made beforehand, for a given wall time.
#
# 10% caption dropout for classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598), timesteps spread evenly
# over each batch, an exponential moving average of the weights, a learning rate that falls to 0 at the end. Two
# processes of one thread each share a batch: on few, busy cores that is faster than two threads in one process.


EMA = 0.999
CAPTION_DROPOUT = 0.1
TEXT_LR = 0.3
"""The text encoder's learning rate, as a share of the UNet's."""
SAVE_EVERY = 120
"""Seconds between saved states."""
_TIMESTEPS = 1000


class _Batches:
    """Random batches of latents, token ids and timesteps."""

    def __init__(self, work: Path, batch_size: int, seed: int) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        captions = np.load(work / "scenes.npz")["captions"]
        self._latents = np.load(work / "latents.npy", mmap_mode="r")
        self._ids = tokenize(tokenizer, captions.reshape(-1).tolist()).view(*captions.shape, -1)
        self._empty = tokenize(tokenizer, [""])[0]
        self._size = batch_size
        self._random = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, 8, 8, 8) channels last, ids (B, 16), timesteps (B,)."""
        pick = torch.randint(len(self._latents), (self._size,), generator=self._random)
        latents = torch.from_numpy(self._latents[pick.numpy()].astype(np.float32))
        which = torch.randint(self._ids.shape[1], (self._size,), generator=self._random)
        dropped = torch.rand(self._size, generator=self._random) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], self._empty, self._ids[pick, which])
        spread = (torch.arange(self._size) + torch.rand(self._size, generator=self._random)) / self._size
        return latents.contiguous(memory_format=torch.channels_last), ids, (spread * _TIMESTEPS).long()


class _Training:
    """Networks, their moving average, the optimizer and how far they are."""

    def __init__(self, work: Path, lr: float) -> None:
        torch.manual_seed(1)
        self.networks: Networks = load_networks(work)
        self.parameters = list(self.networks.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        groups = [
            {"params": list(self.networks.unet.parameters()), "share": 1.0},
            {"params": list(self.networks.text.parameters()), "share": TEXT_LR},
        ]
        self.lr = lr
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self.step, self.spent, self._file = 0, 0.0, work / "unet.pt"
        if self._file.exists():
            state = torch.load(self._file, weights_only=True)
            self.networks.load_state_dict(state["model"])
            self.average = [tensor.clone() for tensor in state["average"]]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state["spent"]

    def save(self, spent: float) -> None:
        """Writes unet.pt in one rename."""
        state = {
            "model": self.networks.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": spent,
        }
        unfinished = self._file.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.rename(self._file)

    def update(self, fraction: float) -> None:
        """One optimizer step with the gradients at hand, at this share of the budget."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["share"] * decayed(fraction, warmup=0.01)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list[Tensor](self.parameters), 1 - keep)


def _train(rank: int, world: int, work: Path, minutes: float, batch_size: int, lr: float) -> None:
    """The loop. All processes agree on the share of the budget that is used, so all stop after the same step."""
    training, scheduler = _Training(work, lr), new_scheduler()
    seed = world * training.step + rank
    batches = _Batches(work, batch_size, seed)
    torch.manual_seed(seed)
    budget = Budget(minutes, training.spent)
    saved, fraction, shown = budget.spent, budget.fraction, float("nan")
    while fraction < 1:
        loss = training.networks.loss(scheduler, *batches.next())
        loss.backward()
        fraction, mean_loss = share_gradients(training.parameters, [budget.fraction, float(loss.detach())], world)
        training.update(fraction)
        shown = mean_loss if shown != shown else 0.98 * shown + 0.02 * mean_loss
        if rank == 0 and training.step % 100 == 0:
            print(f"unet {budget.spent:5.0f} s, step {training.step}, loss {shown:.4f}", flush=True)
        if rank == 0 and (budget.spent - saved > SAVE_EVERY or fraction >= 1):
            saved = budget.spent
            training.save(saved)


def train_unet(work: Path, minutes: float, batch_size: int = 32, lr: float = 1e-3, world: int = 2) -> None:
    """Trains from latents.npy and text_encoder/ until the minutes are used; state in unet.pt, saved on the way.

    Args:
        work: the folder with scenes.npz, latents.npy, tokenizer/ and text_encoder/.
        minutes: wall time, earlier interrupted runs counted in.
        batch_size: scenes a step of each process.
        lr: highest learning rate.
        world: processes, of one thread each; 1 trains in this one.
    """
    launch(_train, world, work, minutes, batch_size, lr)
