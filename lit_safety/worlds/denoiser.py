"""Trains a world's denoiser on precomputed latents for a given wall time: one loop for UNets and transformers."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_safety.core.files import atomic_folder
from lit_safety.worlds.training import Budget, decayed, fast_numbers, launch, share_gradients


def new_scheduler() -> Any:
    """DDIMScheduler with Stable Diffusion's noise schedule and v-prediction; sampling starts from pure noise."""
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


class Trainee(nn.Module):
    """The networks that the loop trains; frozen parts do not require gradients."""

    def loss(self, latents: Tensor, ids: Tensor, spread: Tensor) -> Tensor:
        """The scalar to minimise; its noise comes from torch's global random numbers.

        Args:
            latents: (B, C, h, w), unit variance.
            ids: (B, L) token ids.
            spread: (B,), float32 in [0, 1): each row's noise level from image to noise, spread evenly over the batch.
        """
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """The trained parameters (`params`), each group with its `share` of the learning rate."""
        raise NotImplementedError


class Networks(Trainee):
    """UNet and text encoder, trained together."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        self._scheduler = new_scheduler()

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.unet.parameters()), "share": 1.0},
            {"params": list(self.text.parameters()), "share": TEXT_LR},
        ]

    def loss(self, latents: Tensor, ids: Tensor, spread: Tensor) -> Tensor:
        """Mean squared error of v (Salimans & Ho, 2022, arXiv:2202.00512, appendix D)."""
        timesteps = (spread * _TIMESTEPS).long()
        noise = torch.randn_like(latents)
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = self._scheduler.get_velocity(latents, noise, timesteps)
        with fast_numbers(latents.device):
            hidden = self.text(ids).last_hidden_state
            predicted = self.unet(noisy, timesteps, hidden).sample
        return nn.functional.mse_loss(predicted.float(), target)


def load_networks(work: Path, new_unet: Callable[[], Any]) -> Networks:
    """A new UNet, and the text encoder of the work folder."""
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
    """Random batches of latents, token ids and noise levels."""

    def __init__(self, work: Path, batch_size: int, seed: int, device: str) -> None:
        self._latents = np.load(work / "latents.npy", mmap_mode="r")
        ids = torch.from_numpy(np.load(work / "ids.npy"))
        self._ids, self._empty = ids[:-1], ids[-1, 0]
        self._size, self._device = batch_size, device
        self._random = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w) channels last, ids (B, L), spread (B,) in [0, 1)."""
        pick = torch.randint(len(self._latents), (self._size,), generator=self._random)
        latents = torch.from_numpy(self._latents[pick.numpy()].astype(np.float32))
        which = torch.randint(self._ids.shape[1], (self._size,), generator=self._random)
        dropped = torch.rand(self._size, generator=self._random) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], self._empty, self._ids[pick, which])
        spread = (torch.arange(self._size) + torch.rand(self._size, generator=self._random)) / self._size
        latents = latents.to(self._device).contiguous(memory_format=torch.channels_last)
        return latents, ids.to(self._device), spread.to(self._device)


class _Training:
    """Networks, their moving average, the optimizer and the progress."""

    def __init__(self, work: Path, lr: float, load: Callable[[Path], Trainee], name: str, device: str) -> None:
        torch.manual_seed(1)
        self.networks = load(work).to(device)
        self.parameters = _trained(self.networks)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.lr = lr
        groups = self.networks.groups()
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self.step, self.spent, self._file = 0, 0.0, work / f"{name}.pt"
        if self._file.exists():
            state = torch.load(self._file, weights_only=True, map_location=device)
            self.networks.load_state_dict(state["model"])
            self.average = [tensor.clone() for tensor in state["average"]]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state["spent"]

    def save(self, spent: float) -> None:
        """Writes the state by one rename."""
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
        """One optimizer step with the current gradients, at this used share of the budget."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["share"] * decayed(fraction, warmup=0.01)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list[Tensor](self.parameters), 1 - keep)


def _trained(networks: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in networks.parameters() if parameter.requires_grad]


def _train(
    rank: int,
    world: int,
    work: Path,
    load: Callable[[Path], Trainee],
    name: str,
    minutes: float,
    batch_size: int,
    lr: float,
    device: str,
) -> None:
    """The training loop. All processes agree on the used share of the budget, so that they stop after the same step."""
    training = _Training(work, lr, load, name, device)
    seed = world * training.step + rank
    batches = _Batches(work, batch_size, seed, device)
    torch.manual_seed(seed)
    budget = Budget(minutes, training.spent)
    saved, fraction, shown = budget.spent, budget.fraction, None
    while fraction < 1:
        loss = training.networks.loss(*batches.next())
        loss.backward()
        fraction, mean_loss = share_gradients(training.parameters, budget.fraction, loss.detach(), world)
        training.update(fraction)
        shown = mean_loss if shown is None else 0.98 * shown + 0.02 * mean_loss
        if rank == 0 and training.step % 100 == 0:
            print(f"{name} {budget.spent:5.0f} s, step {training.step}, loss {float(shown):.4f}", flush=True)
        if rank == 0 and (budget.spent - saved > SAVE_EVERY or fraction >= 1):
            saved = budget.spent
            training.save(saved)


def write_ids(work: Path, ids: Tensor, empty: Tensor) -> None:
    """Writes ids.npy (N + 1, E, L) into the work folder.

    Args:
        work: the work folder.
        ids: (N, E, L) token ids of E captions for each image.
        empty: (L,) token ids of the empty caption; they are written as the last row.
    """
    unfinished = work / "ids.part.npy"
    np.save(unfinished, torch.cat([ids, empty.expand(1, *ids.shape[1:])]).numpy())
    unfinished.rename(work / "ids.npy")


def train_networks(
    work: Path,
    load: Callable[[Path], Trainee],
    name: str,
    minutes: float,
    batch_size: int = 32,
    lr: float = 1e-3,
    world: int = 2,
    device: str = "cpu",
) -> None:
    """Trains until the time is used up; the state is saved in {name}.pt from time to time.

    Args:
        work: the folder with latents.npy, ids.npy and what `load` reads.
        load: makes the networks from this folder; a module-level function.
        name: name of the state's file, also used in printed lines.
        minutes: wall time, earlier interrupted runs counted in.
        batch_size: images in a step of each process.
        lr: highest learning rate.
        world: number of processes, with one thread each; 1 trains in this process.
        device: where it trains; a GPU is for one process.
    """
    launch(_train, world, work, load, name, minutes, batch_size, lr, device)


def train_unet(
    work: Path,
    new_unet: Callable[[], Any],
    minutes: float,
    world: int = 2,
    batch_size: int = 32,
    device: str = "cpu",
) -> None:
    """`train_networks` of a UNet and the work folder's text_encoder/; `new_unet`: a module-level function."""
    load = partial(load_networks, new_unet=new_unet)
    train_networks(work, load, "unet", minutes, batch_size, world=world, device=device)


def take_average(networks: Trainee, file: Path) -> None:
    """Loads the averaged weights of a training's state into the networks, in float32 and ready to draw."""
    state = torch.load(file, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for parameter, average in zip(_trained(networks), state["average"], strict=True):
            parameter.copy_(average)
    networks.requires_grad_(False).eval()


def averaged(work: Path, new_unet: Callable[[], Any]) -> Networks:
    """UNet and text encoder with the averaged weights from unet.pt."""
    networks = load_networks(work, new_unet)
    take_average(networks, work / "unet.pt")
    return networks


def write_pipeline(
    work: Path, networks: Networks, tokenizer: Any, target: Path, vocabulary: Path | None = None
) -> None:
    """Writes a pipeline that plain diffusers loads, in float16 safetensors; the folder is replaced at once.

    Args:
        work: the folder with vae/.
        networks: UNet and text encoder; the tokenizer's ids fit the text encoder.
        tokenizer: a CLIPTokenizer.
        target: the pipeline's folder.
        vocabulary: as in `save_pipeline`.
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
    save_pipeline(pipeline, target, vocabulary)


def save_pipeline(pipeline: Any, target: Path, vocabulary: Path | None = None) -> None:
    """Writes a diffusers pipeline in float16 safetensors; afterwards the pipeline itself is in float16.

    Args:
        pipeline: of diffusers.
        target: its folder, which is replaced at once.
        vocabulary: a folder with vocab.json and merges.txt, which are then stored instead of tokenizer.json: the same
            words in two fifths of the size. None: tokenizer.json.
    """
    with atomic_folder(target) as part:
        pipeline.to(torch.float16).save_pretrained(part, safe_serialization=True)
        if vocabulary is not None:
            (part / "tokenizer" / "tokenizer.json").unlink()
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(vocabulary / name, part / "tokenizer" / name)
        for config in part.glob("*/config.json"):
            settings = json.loads(config.read_text(encoding="utf-8"))
            settings.pop("_name_or_path", None)  # the path from which a part was loaded means nothing to users
            if "dtype" in settings:
                # Transformers loads a model in its config's dtype, diffusers in float32: without this a plain
                # from_pretrained would mix the two and could not draw.
                settings["dtype"] = "float32"
            config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in part.rglob("*.safetensors"):
            file.chmod(0o644)
