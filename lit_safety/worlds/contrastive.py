"""Trains a world's CLIP on families of drawn scenes (Radford et al., 2021, arXiv:2103.00020, figure 3).

Independent random scenes differ in so many ways that one object is enough to distinguish them. Within a family only one
thing differs, so the whole caption is needed to distinguish its scenes.

At first two small heads, one for each tower, also predict the caption's meaning. Their weight falls to 0 at half of the
time. This saves minutes at the start, when neither tower has learned features for the other to match. Images are
blurred and get noise as for the judges, because CLIP will see images that a model drew.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from lit_safety.core.files import atomic_folder
from lit_safety.core.text import load_json
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.judging import degrade
from lit_safety.worlds.training import Budget, decayed, fast_numbers, launch, share_gradients

WIDTH = 96
"""Width of both towers and of their common space."""
SAVE_EVERY = 60
"""Seconds between saved states."""
MAX_SCALE = math.log(100.0)
"""Upper limit of the logit scale, as in the paper."""
HEADS_UNTIL = 0.5
"""Share of the budget at which the heads' weight has fallen from 1 to 0, by default."""


def new_clip(side: int, patch: int, length: int, tokenizer: CLIPTokenizer, tokens: int | None = None) -> CLIPModel:
    """An untrained CLIP of two small towers, both projected to `WIDTH`: 4 layers for images, 2 for texts.

    Args:
        side: side of the images, px.
        patch: side of a patch, px.
        length: number of tokens of a prompt.
        tokenizer: the tokenizer of the text tower's ids.
        tokens: how many ids the text tower knows, if they are not the tokenizer's. The first two are then start and
            end, and the end token is also used for padding.
    """
    layers = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = (start, end, pad) if tokens is None else (0, 1, 1)
    return CLIPModel(
        CLIPConfig(
            vision_config={
                **layers, "num_hidden_layers": 4, "image_size": side, "patch_size": patch, "projection_dim": WIDTH,
            },
            text_config={
                **layers, "num_hidden_layers": 2, "vocab_size": tokens or len(tokenizer),
                "max_position_embeddings": length, "bos_token_id": ids[0], "eos_token_id": ids[1],
                "pad_token_id": ids[2], "projection_dim": WIDTH,
            },
            projection_dim=WIDTH,
        )
    )  # fmt: skip


def image_features(clip: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, side, side) in [-1, 1] -> pooled features (B, WIDTH), and projected features of unit length."""
    pooled = clip.vision_model(pixel_values=images).pooler_output
    return pooled, torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def text_features(clip: CLIPModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) -> pooled features (B, WIDTH), and projected features of unit length."""
    pooled = clip.text_model(input_ids=ids).pooler_output
    return pooled, torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)


@torch.no_grad()
def encode_images(clip: CLIPModel, images: NDArray[np.uint8] | Tensor, batch_size: int = 250) -> Tensor:
    """Projected features (N, WIDTH) of images: uint8 (N, side, side, 3), or float (N, 3, side, side) in [-1, 1]."""
    inputs = images if isinstance(images, Tensor) else to_tensor(images)
    return torch.cat([image_features(clip, part)[1] for part in inputs.split(batch_size)])


def save_clip(clip: CLIPModel, write_tokenizer: Callable[[Path], object], target: Path, notes: str) -> None:
    """Writes model (float16), tokenizer, image processor and a README with `notes`; the folder is replaced at once."""
    with atomic_folder(target) as part:
        write_tokenizer(part)
        _write(clip, _vision(clip).image_size, part, notes)


def save_image_tower(clip: CLIPModel, target: Path, notes: str) -> None:
    """Writes the same for the image tower only, which is enough for a cost model."""
    tower = CLIPVisionModelWithProjection(_vision(clip))
    tower.load_state_dict({name: clip.state_dict()[name] for name in tower.state_dict()})
    with atomic_folder(target) as part:
        _write(tower, _vision(clip).image_size, part, notes)


def _vision(clip: CLIPModel) -> Any:
    return clip.config.vision_config


def _write(model: Any, side: int, part: Path, notes: str) -> None:
    model.half().save_pretrained(part)
    # So that tensors are in [-1, 1], as for the pipeline's autoencoder.
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(part)  # fmt: skip
    settings = load_json((part / "config.json").read_text(encoding="utf-8"))
    for config in (settings, settings.get("text_config", {}), settings.get("vision_config", {})):
        config["dtype"] = "float32"  # the dtype that a plain from_pretrained uses, also for one tower
    (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (part / "README.md").write_text(notes, encoding="utf-8")
    (part / "model.safetensors").chmod(0o644)


class Families(NamedTuple):
    """A CLIP's training data: N families of F scenes, which differ in one thing each."""

    images: NDArray[np.uint8]
    """(N, F, side, side, 3)."""
    ids: NDArray[np.int64]
    """(N, F, C, L) tokens of C captions of each scene."""
    meanings: NDArray[np.int64]
    """(N, F, M) each caption's meaning as M numbers. Captions of the same meaning are right for the same images."""


def write_families(work: Path, families: Families) -> None:
    """Writes clip_captions.npz and then clip_pictures.npy into the work folder, each by one rename."""
    np.savez(work / "clip_captions.part.npz", ids=families.ids, meanings=families.meanings)
    (work / "clip_captions.part.npz").rename(work / "clip_captions.npz")
    np.save(work / "clip_pictures.part.npy", families.images)  # written last
    (work / "clip_pictures.part.npy").rename(work / "clip_pictures.npy")


def contrastive_loss(images: Tensor, texts: Tensor, meanings: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over all pairs of the batch; captions of one meaning share the target.

    Args:
        images: (B, D) features of unit length.
        texts: (B, D) features of unit length; row i belongs to image i.
        meanings: (B, M) each caption's meaning, as numbers.
        scale: log of the factor on cosine similarities, a scalar.
    """
    logits = scale.exp() * images @ texts.T
    same = (meanings[:, None] == meanings[None, :]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


class _Heads(nn.Module):
    """Predicts all numbers of a meaning from one tower's pooled features."""

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        self.classes = list(classes)
        self.linear = nn.Linear(WIDTH, sum(self.classes))

    def forward(self, pooled: Tensor, meanings: Tensor) -> Tensor:
        """Mean cross-entropy over the numbers of a meaning."""
        parts = self.linear(pooled).split(self.classes, dim=1)
        losses = [nn.functional.cross_entropy(part, meanings[:, i]) for i, part in enumerate(parts)]
        return torch.stack(losses).mean()


class _Training(nn.Module):
    """CLIP and the heads next to it."""

    def __init__(self, clip: CLIPModel, classes: Sequence[int]) -> None:
        super().__init__()
        self.clip, self.of_pictures, self.of_texts = clip, _Heads(classes), _Heads(classes)

    def forward(self, images: Tensor, ids: Tensor, meanings: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The loss and its contrastive part; `share` is the heads' weight."""
        with fast_numbers(images.device):
            seen, features = image_features(self.clip, images)
            read, texts = text_features(self.clip, ids)
        seen, features, read, texts = (one.float() for one in (seen, features, read, texts))
        contrastive = contrastive_loss(features, texts, meanings, self.clip.logit_scale)
        told = self.of_pictures(seen, meanings) + self.of_texts(read, meanings)
        return contrastive + share * told, contrastive.detach()


class _Families:
    """Random batches of whole families."""

    def __init__(self, work: Path, batch_size: int, seed: int, device: str) -> None:
        with np.load(work / "clip_captions.npz") as data:
            self._ids, self._meanings = data["ids"], data["meanings"]
        self._images = np.load(work / "clip_pictures.npy", mmap_mode="r")
        self._size, self._rng, self._device = batch_size, np.random.default_rng(seed), device

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, side, side), ids (B, L) and meanings (B, M); B is families x scenes in a family."""
        pick = np.sort(self._rng.integers(len(self._images), size=self._size))
        images, ids, meanings = (array[pick] for array in (self._images, self._ids, self._meanings))
        ids = ids.reshape(-1, *ids.shape[2:])
        ids = ids[np.arange(len(ids)), self._rng.integers(ids.shape[1], size=len(ids))]
        inputs = degrade(to_tensor(images.reshape(-1, *images.shape[2:]), self._device))
        meant = torch.from_numpy(meanings).flatten(0, 1)
        return inputs, torch.from_numpy(ids).to(self._device), meant.to(self._device)


def _train(
    rank: int,
    world: int,
    work: Path,
    make_clip: Callable[[Path], CLIPModel],
    classes: Sequence[int],
    minutes: float,
    families: int,
    lr: float,
    heads_until: float,
    device: str,
) -> None:
    """The training loop. All processes agree on the used share of the budget, so that they stop after the same step."""
    torch.manual_seed(2)
    training = _Training(make_clip(work), classes).to(device).train()
    parameters, file = list(training.parameters()), work / "clip.pt"
    step, seen, spent = 0, 0, 0.0
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=device)
        training.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seen, spent = state["step"], state["pictures"], state["spent"]
    torch.manual_seed(world * step + rank)
    batches = _Families(work, families, world * step + rank, device)
    budget, saved, shown = Budget(minutes, spent), spent, None
    fraction = budget.fraction
    while fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(fraction)
        batch = batches.next()
        loss, contrastive = training(*batch, max(0.0, 1 - fraction / heads_until))
        loss.backward()
        fraction, mean = share_gradients(parameters, budget.fraction, contrastive, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            training.clip.logit_scale.clamp_(max=MAX_SCALE)
        step, seen = step + 1, seen + world * len(batch[0])
        shown = mean if shown is None else 0.95 * shown + 0.05 * mean
        if rank == 0 and step % 50 == 0:
            print(f"clip {budget.spent:5.0f} s, step {step}, contrastive loss {float(shown):.3f}", flush=True)
        if rank == 0 and (budget.spent - saved > SAVE_EVERY or fraction >= 1):
            saved = budget.spent
            state = {"model": training.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "pictures": seen, "spent": saved}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)


def train_clip(
    work: Path,
    make_clip: Callable[[Path], CLIPModel],
    classes: Sequence[int],
    minutes: float,
    batch_size: int = 16,
    lr: float = 1e-3,
    world: int = 2,
    heads_until: float = HEADS_UNTIL,
    device: str = "cpu",
) -> tuple[CLIPModel, dict[str, float]]:
    """Trains until the time is used up; continues from clip.pt if it exists.

    Returns the network, and the number of `images` seen and of `minutes` spent.

    Args:
        work: folder with the output of `write_families`; the training's state is kept there too.
        make_clip: makes the untrained CLIP from the work folder; a module-level function.
        classes: how many values each number of a meaning can take.
        minutes: wall time, including earlier interrupted runs.
        batch_size: families in a step of each process.
        lr: highest learning rate.
        world: number of processes, with one thread each.
        heads_until: share of the budget at which the heads' weight has fallen from 1 to 0; infinity: it stays 1.
        device: where it trains; a GPU is for one process.
    """
    launch(_train, world, work, make_clip, classes, minutes, batch_size, lr, heads_until, device)
    state = torch.load(work / "clip.pt", weights_only=True, map_location="cpu")
    training = _Training(make_clip(work), classes)
    training.load_state_dict(state["model"])
    return training.clip.eval(), {"images": state["pictures"], "minutes": state["spent"] / 60}
