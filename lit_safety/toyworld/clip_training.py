"""Trains the toy CLIP (Radford et al., 2021, arXiv:2103.00020, figure 3) on families of drawn scenes.

Two small heads, one a tower, must at first also tell what the caption says; their weight falls to 0 at half time.
That takes minutes off the start, when neither tower has anything for the other to agree with. Pictures are blurred and
made noisy as for the judges, since CLIP will see pictures that a model drew.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from lit_safety.toyworld.clip import WIDTH, image_features, new_clip, text_features
from lit_safety.toyworld.clip_data import CAPTIONS_EACH, FAMILY, make_families
from lit_safety.toyworld.clock import Budget, decayed
from lit_safety.toyworld.judge_training import degrade
from lit_safety.toyworld.processes import launch, share_gradients
from lit_safety.toyworld.text import CLASSES
from lit_safety.toyworld.tokenizer import build_tokenizer
from lit_safety.toyworld.vae import to_tensor

SAVE_EVERY = 60
"""Seconds between saved states."""
MAX_SCALE = math.log(100.0)
"""The logit scale is held below this, as in the paper."""
HEADS_UNTIL = 0.5
"""Share of the budget at which the heads' weight has fallen from 1 to 0."""


def contrastive_loss(images: Tensor, texts: Tensor, meanings: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over all pairs of the batch; captions of one meaning share the target.

    Args:
        images: (B, D) features of unit length.
        texts: (B, D) likewise; row i belongs to picture i.
        meanings: (B, 5) what each caption says, as numbers.
        scale: log of the factor on cosine similarities, a scalar.
    """
    logits = scale.exp() * images @ texts.T
    same = (meanings[:, None] == meanings[None, :]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


class _Heads(nn.Module):
    """What stands first and second, in which colours and which setting, told from one tower's pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, sum(CLASSES))

    def forward(self, pooled: Tensor, meanings: Tensor) -> Tensor:
        """Mean cross-entropy over the numbers of a meaning."""
        parts = self.linear(pooled).split(CLASSES, dim=1)
        losses = [nn.functional.cross_entropy(part, meanings[:, i]) for i, part in enumerate(parts)]
        return torch.stack(losses).mean()


class _Training(nn.Module):
    """CLIP and the heads beside it."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip, self.of_pictures, self.of_texts = clip, _Heads(), _Heads()

    def forward(self, pictures: Tensor, ids: Tensor, meanings: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The loss, and its contrastive part; `share` is the heads' weight."""
        seen, images = image_features(self.clip, pictures)
        read, texts = text_features(self.clip, ids)
        contrastive = contrastive_loss(images, texts, meanings, self.clip.logit_scale)
        told = self.of_pictures(seen, meanings) + self.of_texts(read, meanings)
        return contrastive + share * told, contrastive.detach()


class _Families:
    """Random batches of whole families."""

    def __init__(self, work: Path, batch_size: int, seed: int) -> None:
        with np.load(work / "clip_captions.npz") as data:
            self._ids, self._meanings = data["ids"], data["meanings"]
        self._pictures = np.load(work / "clip_pictures.npy", mmap_mode="r")
        self._size, self._rng = batch_size, np.random.default_rng(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, 32, 32), ids (B, 16) and meanings (B, 5); B is families x `FAMILY`."""
        pick = np.sort(self._rng.integers(len(self._pictures), size=self._size))
        pictures, ids, meanings = (array[pick] for array in (self._pictures, self._ids, self._meanings))
        ids = ids.reshape(-1, *ids.shape[2:])
        ids = ids[np.arange(len(ids)), self._rng.integers(CAPTIONS_EACH, size=len(ids))]
        inputs = degrade(to_tensor(pictures.reshape(-1, *pictures.shape[2:])))
        return inputs, torch.from_numpy(ids), torch.from_numpy(meanings).flatten(0, 1)


def _train(rank: int, world: int, work: Path, minutes: float, families: int, lr: float) -> None:
    """The loop. All processes agree on the share of the budget that is used, so all stop after the same step."""
    torch.manual_seed(2)
    training = _Training(new_clip(CLIPTokenizer.from_pretrained(work / "clip_tokenizer"))).train()
    parameters, file = list(training.parameters()), work / "clip.pt"
    step, seen, spent = 0, 0, 0.0
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    if file.exists():
        state = torch.load(file, weights_only=True)
        training.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seen, spent = state["step"], state["pictures"], state["spent"]
    torch.manual_seed(world * step + rank)
    batches = _Families(work, families, world * step + rank)
    budget, saved, shown = Budget(minutes, spent), spent, float("nan")
    fraction = budget.fraction
    while fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(fraction)
        loss, contrastive = training(*batches.next(), max(0.0, 1 - fraction / HEADS_UNTIL))
        loss.backward()
        fraction, mean = share_gradients(parameters, [budget.fraction, float(contrastive)], world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            training.clip.logit_scale.clamp_(max=MAX_SCALE)
        step, seen = step + 1, seen + world * families * FAMILY
        shown = mean if shown != shown else 0.95 * shown + 0.05 * mean
        if rank == 0 and step % 50 == 0:
            print(f"clip {budget.spent:5.0f} s, step {step}, contrastive loss {shown:.3f}", flush=True)
        if rank == 0 and (budget.spent - saved > SAVE_EVERY or fraction >= 1):
            saved = budget.spent
            state = {"model": training.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "pictures": seen, "spent": saved}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)


def train_clip(
    work: Path, minutes: float, families: int = 12_000, batch_size: int = 16, lr: float = 1e-3, world: int = 2
) -> tuple[CLIPModel, dict[str, float]]:
    """Trains until the minutes are used, from clip.pt on if it is there.

    Returns the network, and the `pictures` seen and `minutes` spent.

    Args:
        work: keeps the drawn families and the state of the training.
        minutes: wall time, earlier interrupted runs counted in.
        families: how many are drawn from the seed range "clip".
        batch_size: families a step of each process.
        lr: highest learning rate.
        world: processes, of one thread each.
    """
    tokenizer = build_tokenizer(work / "clip_tokenizer")
    if not (work / "clip_pictures.npy").exists():
        make_families(work, tokenizer, families, world)
    launch(_train, world, work, minutes, batch_size, lr)
    training, state = _Training(new_clip(tokenizer)), torch.load(work / "clip.pt", weights_only=True)
    training.load_state_dict(state["model"])
    return training.clip.eval(), {"pictures": state["pictures"], "minutes": state["spent"] / 60}
