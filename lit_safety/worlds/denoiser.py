"""Trains UNet and text encoder of a world's pipeline on latents made beforehand, for a given wall time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_safety.core.files import atomic_folder
from lit_safety.worlds.training import Budget, decayed, launch, share_gradients


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
            latents: (B, C, h, w), unit variance.
            ids: (B, L) token ids.
            timesteps: (B,).
        """
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):  # 1.45 times as fast as float32 on a CPU with AVX-512 BF16
            hidden = self.text(ids).last_hidden_state
            predicted = self.unet(noisy, timesteps, hidden).sample
        return nn.functional.mse_loss(predicted.float(), target)


def load_networks(work: Path, new_unet: Callable[[], Any]) -> Networks:
    """A new UNet next to the text encoder of the work folder."""
    unet = new_unet().to(memory_format=torch.channels_last)
    return Networks(unet, CLIPTextModel.from_pretrained(work / "text_encoder").train())


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
        self._latents = np.load(work / "latents.npy", mmap_mode="r")
        ids = torch.from_numpy(np.load(work / "ids.npy"))
        self._ids, self._empty = ids[:-1], ids[-1, 0]
        self._size = batch_size
        self._random = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w) channels last, ids (B, L), timesteps (B,)."""
        pick = torch.randint(len(self._latents), (self._size,), generator=self._random)
        latents = torch.from_numpy(self._latents[pick.numpy()].astype(np.float32))
        which = torch.randint(self._ids.shape[1], (self._size,), generator=self._random)
        dropped = torch.rand(self._size, generator=self._random) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], self._empty, self._ids[pick, which])
        spread = (torch.arange(self._size) + torch.rand(self._size, generator=self._random)) / self._size
        return latents.contiguous(memory_format=torch.channels_last), ids, (spread * _TIMESTEPS).long()


class _Training:
    """Networks, their moving average, the optimizer and how far they are."""

    def __init__(self, work: Path, lr: float, new_unet: Callable[[], Any]) -> None:
        torch.manual_seed(1)
        self.networks: Networks = load_networks(work, new_unet)
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


def _train(
    rank: int,
    world: int,
    work: Path,
    new_unet: Callable[[], Any],
    minutes: float,
    batch_size: int,
    lr: float,
) -> None:
    """The loop. All processes agree on the share of the budget that is used, so all stop after the same step."""
    training, scheduler = _Training(work, lr, new_unet), new_scheduler()
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


def write_ids(work: Path, ids: Tensor, empty: Tensor) -> None:
    """Writes ids.npy (N + 1, E, L) into the work folder.

    Args:
        work: the folder.
        ids: (N, E, L) token ids of E captions an image.
        empty: (L,) those of no caption; they stand last.
    """
    unfinished = work / "ids.part.npy"
    np.save(unfinished, torch.cat([ids, empty.expand(1, *ids.shape[1:])]).numpy())
    unfinished.rename(work / "ids.npy")


def train_unet(
    work: Path,
    new_unet: Callable[[], Any],
    minutes: float,
    batch_size: int = 32,
    lr: float = 1e-3,
    world: int = 2,
) -> None:
    """Trains until the minutes are used; state in unet.pt, saved on the way.

    Args:
        work: the folder with latents.npy, ids.npy and text_encoder/.
        new_unet: makes the untrained UNet; a function of a module.
        minutes: wall time, earlier interrupted runs counted in.
        batch_size: images a step of each process.
        lr: highest learning rate.
        world: processes, of one thread each; 1 trains in this one.
    """
    launch(_train, world, work, new_unet, minutes, batch_size, lr)


def averaged(work: Path, new_unet: Callable[[], Any]) -> Networks:
    """The networks with the averaged weights of unet.pt, float32, ready to draw."""
    networks = load_networks(work, new_unet)
    state = torch.load(work / "unet.pt", weights_only=True)
    with torch.no_grad():
        for parameter, average in zip(networks.parameters(), state["average"], strict=True):
            parameter.copy_(average)
    return networks.requires_grad_(False).eval()


def write_pipeline(work: Path, networks: Networks, tokenizer: Any, target: Path) -> None:
    """Writes the pipeline that plain diffusers loads, in float16 safetensors, in one swap.

    Args:
        work: the folder with vae/.
        networks: UNet and the text encoder that the tokenizer's ids fit.
        tokenizer: a CLIPTokenizer.
        target: the pipeline's folder.
    """
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=networks.text,
        tokenizer=tokenizer,
        unet=networks.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(target) as part:
        pipeline.to(torch.float16).save_pretrained(part, safe_serialization=True)
        for config in part.glob("*/config.json"):
            settings = json.loads(config.read_text(encoding="utf-8"))
            settings.pop("_name_or_path", None)  # where a part was loaded from says nothing to its user
            if "dtype" in settings:
                # Transformers loads a model in its config's type, diffusers in float32: without this a plain
                # from_pretrained mixes the two and cannot draw.
                settings["dtype"] = "float32"
            config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in part.rglob("*.safetensors"):
            file.chmod(0o644)
