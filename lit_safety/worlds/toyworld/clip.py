"""The toy world's CLIP: a transformers CLIPModel of 0.65 M parameters for 32x32 images."""

import json
import math
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from lit_safety.core.files import atomic_folder
from lit_safety.core.processes import each
from lit_safety.core.text import load_json
from lit_safety.judges.toy.objects import BENIGN, CONCEPTS, LOOKALIKES, SETTINGS
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.judging import degrade
from lit_safety.worlds.toyworld.captions import draw_caption
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.sampling import Contents, arrange, draw_scene, grade
from lit_safety.worlds.toyworld.scene import SIDE, render, to_array
from lit_safety.worlds.toyworld.seeds import stream
from lit_safety.worlds.toyworld.text import CLASSES, LENGTH, build_tokenizer, tokenize
from lit_safety.worlds.training import Budget, decayed, launch, share_gradients

WIDTH = 96
PATCH = 4


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP: image tower of 4 layers over 8x8 patches, text tower of 2, both projected to `WIDTH`."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            vision_config={
                **layers, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": PATCH, "projection_dim": WIDTH,
            },
            text_config={
                **layers, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH,
                "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id, "projection_dim": WIDTH,
            },
            projection_dim=WIDTH,
        )
    )  # fmt: skip


def image_features(clip: CLIPModel, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of images (B, 3, 32, 32) in [-1, 1]: pooled features (B, WIDTH), and projected ones of unit length."""
    pooled = clip.vision_model(pixel_values=pictures).pooler_output
    return pooled, torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def text_features(clip: CLIPModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of token ids (B, LENGTH): pooled features (B, WIDTH), and projected ones of unit length."""
    pooled = clip.text_model(input_ids=ids).pooler_output
    return pooled, torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)


@torch.no_grad()
def encode_pictures(clip: CLIPModel, pictures: NDArray[np.uint8] | Tensor, batch_size: int = 250) -> Tensor:
    """Projected features (N, WIDTH) of many images: uint8 (N, 32, 32, 3), or float (N, 3, 32, 32) in [-1, 1]."""
    inputs = pictures if isinstance(pictures, Tensor) else to_tensor(pictures)
    return torch.cat([image_features(clip, part)[1] for part in inputs.split(batch_size)])


@torch.no_grad()
def encode_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], batch_size: int = 500) -> Tensor:
    """Projected features (N, WIDTH) of many captions."""
    return torch.cat([text_features(clip, part)[1] for part in tokenize(tokenizer, texts).split(batch_size)])


def load_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped CLIP in float32, ready to score."""
    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


def save_clip(clip: CLIPModel, target: Path, notes: str) -> None:
    """Writes model (float16), tokenizer, image processor and a README of `notes`, in one swap."""
    with atomic_folder(target) as part:
        build_tokenizer(part)
        clip.half().save_pretrained(part)
        # Tensors in [-1, 1], as the pipeline's autoencoder has them.
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        ).save_pretrained(part)  # fmt: skip
        settings = load_json((part / "config.json").read_text(encoding="utf-8"))
        for config in (settings, settings["text_config"], settings["vision_config"]):
            config["dtype"] = "float32"  # what a plain from_pretrained, also of one tower alone, then computes in
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(notes, encoding="utf-8")
        (part / "model.safetensors").chmod(0o644)


# What CLIP learns from: families of scenes that differ in one thing each, and captions of them.
#
# Scenes drawn by themselves differ in so much that a glance at one object tells them apart. Within a family only the
# whole caption does.


Change = Literal["object", "colour", "lookalike", "missing", "order", "setting"]
CHANGES: tuple[Change, ...] = get_args(Change)
"""What is exchanged: a thing for another of its sort, a colour, a harm and its look-alike for each other, one of two
things for nothing, left and right, the setting."""
_WEIGHTS = {"object": 3, "colour": 3, "lookalike": 3, "missing": 1, "order": 1, "setting": 1}

FAMILY = 4
"""Scenes of a family: one, and three with something exchanged."""
CAPTIONS_EACH = 3
GRADED = 0.3
"""Share of harms that are smaller, partly hidden or doubled."""


class Meaning(NamedTuple):
    """All that a caption says. Two captions of one meaning are right for the same images."""

    setting: str
    contents: Contents


def _other(rng: np.random.Generator, names: tuple[str, ...], contents: Contents) -> str:
    taken = {name for name, _ in contents}
    return str(rng.choice([name for name in names if name not in taken]))


def _sort(name: str) -> tuple[str, ...]:
    return next(sort for sort in (tuple(CONCEPTS), BENIGN, LOOKALIKES) if name in sort)


def possible(meaning: Meaning) -> list[Change]:
    """The changes that this meaning allows."""
    names = [name for name, _ in meaning.contents]
    found: list[Change] = ["object", "setting"]
    if any(colour for _, colour in meaning.contents):
        found.append("colour")
    if any(name not in BENIGN for name in names):
        found.append("lookalike")
    if len(names) == 2:
        found += ["missing", "order"]
    return found


def exchange(rng: np.random.Generator, meaning: Meaning, change: Change) -> Meaning:
    """The meaning with one thing exchanged; `change` must be `possible`."""
    setting, contents = meaning
    if change == "setting":
        return Meaning(str(rng.choice([name for name in SETTINGS if name != setting])), contents)
    if change == "order":
        return Meaning(setting, contents[::-1])
    which = [i for i, (name, colour) in enumerate(contents) if _fits(change, name, colour)]
    hit = int(rng.choice(which))
    if change == "missing":
        return Meaning(setting, contents[:hit] + contents[hit + 1 :])
    name, colour = contents[hit]
    if change == "object":
        name = _other(rng, _sort(name), contents)
    elif change == "colour":
        colour = str(rng.choice([other for other in COLOURS if other != colour]))
    elif name in CONCEPTS:
        name = CONCEPTS[name].lookalike
    else:
        name = str(rng.choice([harm for harm, concept in CONCEPTS.items() if concept.lookalike == name]))
    return Meaning(setting, (*contents[:hit], (name, colour), *contents[hit + 1 :]))


def _fits(change: Change, name: str, colour: str | None) -> bool:
    if change == "colour":
        return colour is not None
    return name not in BENIGN if change == "lookalike" else True


def draw_family(owner: str, index: int) -> list[tuple[NDArray[np.uint8], list[str], Meaning]]:
    """Image (SIDE, SIDE, 3), captions and meaning of each scene of the owner's family number `index`."""
    rng = stream(owner, index)
    scene, contents = draw_scene(rng)
    meanings = [Meaning(scene.setting, contents)]
    while len(meanings) < FAMILY:
        allowed = possible(meanings[0])
        weights = np.array([_WEIGHTS[change] for change in allowed], float)
        other = exchange(rng, meanings[0], allowed[int(rng.choice(len(allowed), p=weights / weights.sum()))])
        if other not in meanings:
            meanings.append(other)
    return [(*draw_meaning(rng, meaning), meaning) for meaning in meanings]


def draw_meaning(rng: np.random.Generator, meaning: Meaning) -> tuple[NDArray[np.uint8], list[str]]:
    """An image (SIDE, SIDE, 3) and captions of a meaning."""
    scene = arrange(rng, meaning.setting, meaning.contents)
    if rng.random() < GRADED:
        scene = grade(rng, scene)
    captions = [draw_caption(rng, meaning.setting, meaning.contents) for _ in range(CAPTIONS_EACH)]
    return to_array(render(scene)), captions


def _chunk(bounds: tuple[str, int, int]) -> list[list[tuple[NDArray[np.uint8], list[str], Meaning]]]:
    owner, start, stop = bounds
    return [draw_family(owner, index) for index in range(start, stop)]


def make_families(work: Path, tokenizer: "CLIPTokenizer", count: int, workers: int = 2) -> None:
    """Draws the first `count` families of range "clip" into the work folder.

    clip_pictures.npy: (count, FAMILY, SIDE, SIDE, 3) uint8. clip_captions.npz: `ids` (count, FAMILY, CAPTIONS_EACH,
    LENGTH) tokens and `meanings` (count, FAMILY, 5), see `text.meaning`.
    """
    from lit_safety.worlds.toyworld.text import meaning, tokenize

    bounds = [("clip", start, min(start + 250, count)) for start in range(0, count, 250)]
    pictures, captions, meanings = np.empty((count, FAMILY, SIDE, SIDE, 3), np.uint8), [], []
    families = (family for chunk in each(_chunk, bounds, workers) for family in chunk)
    for index, family in enumerate(families):
        pictures[index] = [picture for picture, _, _ in family]
        captions += [caption for _, said, _ in family for caption in said]
        meanings.append([meaning(*meant) for _, _, meant in family])
    ids = tokenize(tokenizer, captions).numpy().reshape(count, FAMILY, CAPTIONS_EACH, -1)
    np.savez(work / "clip_captions.part.npz", ids=ids, meanings=np.array(meanings))
    (work / "clip_captions.part.npz").rename(work / "clip_captions.npz")
    np.save(work / "clip_pictures.part.npy", pictures)  # the last of them
    (work / "clip_pictures.part.npy").rename(work / "clip_pictures.npy")


# Trains the toy CLIP (Radford et al., 2021, arXiv:2103.00020, figure 3) on families of drawn scenes.
#
# Two small heads, one a tower, must at first also tell what the caption says; their weight falls to 0 at half time.
# That takes minutes off the start, when neither tower has anything for the other to agree with. Images are blurred
# and made noisy as for the judges, since CLIP will see images that a model drew.


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
        texts: (B, D) likewise; row i belongs to image i.
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
    """CLIP and the heads next to it."""

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
        """Images (B, 3, 32, 32), ids (B, 16) and meanings (B, 5); B is families x `FAMILY`."""
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
