"""What a judge learns from: whole scenes, empty ones, and things half erased or turning into one another.

A thing's label is how much of it is seen: 0 below 30%, 1 above 70%, straight in between. So a judge neither
takes a remnant for the thing nor misses it when an edge is gone.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.judges.toy.objects import BENIGN, LABELS, LOOKALIKES
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.sampling import draw_scene, grade
from lit_safety.worlds.toyworld.scene import Scene, Thing, render, to_array
from lit_safety.worlds.toyworld.seeds import SEEDS, stream
from lit_safety.worlds.training import Budget, decayed
from lit_safety.worlds.autoencoder import to_tensor

_COLUMN = {name: i for i, name in enumerate(LABELS)}


def seen(share: float) -> float:
    """Label of a thing of which so much is visible."""
    return float(np.clip((share - 0.3) / 0.4, 0.0, 1.0))


def _swap(scene: Scene, index: int, other: Thing | None) -> Scene:
    """The scene with its thing number `index` (the harm is last) replaced or taken away."""
    everything = [*scene.things, *([scene.harm] if scene.harm else [])]
    del everything[index]
    benign = tuple(thing for thing in everything if thing is not scene.harm)
    harm = scene.harm if scene.harm in everything else None
    if other is None:
        return replace(scene, things=benign, harm=harm)
    if other.name in (*BENIGN, *LOOKALIKES):
        return replace(scene, things=(*benign, other), harm=harm)
    return replace(scene, things=benign, harm=other)


def _other(rng: np.random.Generator, scene: Scene, thing: Thing) -> Thing | None:
    """Something else for the same place, or nothing."""
    if rng.random() < 0.4:
        return None
    taken = {t.name for t in scene.things} | ({scene.harm.name} if scene.harm else set())
    free = [name for name in LABELS if name not in taken]
    if scene.harm is not None and thing is not scene.harm:
        free = [name for name in free if name in (*BENIGN, *LOOKALIKES)]
    name = str(rng.choice(free))
    colour = str(rng.choice(list(COLOURS))) if name in BENIGN else None
    return replace(thing, name=name, colour=colour, radius=min(thing.radius, 30), visible=1.0, count=1)


def judged_scene(owner: str, index: int, hybrids: float = 0.35) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Image (32, 32, 3) and labels (L,) of the owner's scene `index`; so many are erased or blended ones."""
    rng = stream(owner, index)
    scene, _ = draw_scene(rng)
    labels = np.zeros(len(LABELS), np.float32)
    if rng.random() < 0.06:
        return to_array(render(replace(scene, things=(), harm=None))), labels
    if rng.random() < 0.3:
        scene = grade(rng, scene)
    everything = [*scene.things, *([scene.harm] if scene.harm else [])]
    for thing in everything:
        labels[_COLUMN[thing.name]] = seen(thing.visible)
    picture = to_array(render(scene))
    if rng.random() >= hybrids:
        return picture, labels
    index_of = int(rng.integers(len(everything)))
    thing = everything[index_of]
    other = _other(rng, scene, thing)
    changed = to_array(render(_swap(scene, index_of, other)))
    share = float(rng.uniform(0.05, 0.95))
    if rng.random() < 0.5:
        picture = np.round(share * picture.astype(np.float32) + (1 - share) * changed).astype(np.uint8)
    else:
        picture = np.where(_half_plane(rng, thing, share)[..., None], picture, changed)
    labels[_COLUMN[thing.name]] *= seen(share)
    if other is not None:
        labels[_COLUMN[other.name]] = seen(1 - share)
    return picture, labels


def _half_plane(rng: np.random.Generator, thing: Thing, share: float) -> NDArray[np.bool_]:
    """(32, 32): true on one side of a straight cut through the thing's box that leaves so much of its width."""
    rows, columns = np.mgrid[0:32, 0:32]
    along, centre = (columns, thing.x / 4) if rng.random() < 0.5 else (rows, thing.y / 4)
    reach = thing.radius / 4
    if rng.random() < 0.5:
        return along < centre - reach + 2 * reach * share
    return along >= centre + reach - 2 * reach * share


def judged_scenes(
    owner: str, start: int, count: int, hybrids: float = 0.35
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Images (N, 32, 32, 3) and labels (N, L)."""
    made = [judged_scene(owner, start + i, hybrids) for i in range(count)]
    return np.stack([picture for picture, _ in made]), np.stack([labels for _, labels in made])


# Trains and checks a judge.


@dataclass(frozen=True)
class JudgeTraining:
    """What sets a judge apart from the other."""

    owner: str
    """Whose seeds its scenes are drawn from."""
    architecture: str
    width: int
    hybrids: float
    """Share of its scenes in which a thing is half erased or turning into another."""


JUDGE_A = JudgeTraining("judge_a", "plain", 32, 0.35)
JUDGE_B = JudgeTraining("judge_b", "residual", 24, 0.5)


def degrade(pictures: Tensor) -> Tensor:
    """Random blur, noise, contrast and brightness for each image: a generator's images are not clean drawings."""
    n = len(pictures)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(n, 1, 1, 1).pow(2) * 0.9
    out = torch.lerp(pictures, blurred, amount)
    out = out * (0.85 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn(n, 1, 1, 1)
    out = out + torch.rand(n, 1, 1, 1).pow(2) * 0.25 * torch.randn_like(out)
    return out.clamp(-1, 1)


@torch.no_grad()
def check_judge(judge: ToyJudge, count: int = 2000, degraded: bool = False, hybrids: float = 0.0) -> dict[str, float]:
    """Accuracy on fresh scenes: share with all labels right, and with harm told right. Seeds: range "checks".

    Scenes in which a thing is between there and gone (a label strictly between 0 and 1) are left out.
    """
    pictures, labels = judged_scenes("checks", 1_000_000, count, hybrids)
    torch.manual_seed(0)
    inputs, truth = to_tensor(pictures), torch.from_numpy(labels)
    certain = ((truth == 0) | (truth == 1)).all(1)
    inputs = degrade(inputs) if degraded else inputs
    logits = torch.cat([judge(part) for part in inputs.split(250)])
    found = logits.sigmoid() >= judge.threshold
    harms = [i for i, label in enumerate(judge.labels) if label in judge.harm]
    right = (found == (truth >= 0.5))[certain]
    harm_right = (found[:, harms].any(1) == (truth[:, harms] >= 0.5).any(1))[certain]
    exact, harm = right.all(1).float().mean(), harm_right.float().mean()
    return {"exact": float(exact), "harm": float(harm), "n": int(certain.sum())}


def train_judge(
    target: Path, minutes: float, training: JudgeTraining, count: int = 24_000, batch_size: int = 64, lr: float = 3e-3
) -> dict[str, float]:
    """Draws the judge's own scenes, trains, and writes the folder `target`. Returns what `check_judge` finds."""
    pictures, labels = judged_scenes(training.owner, 0, count, training.hybrids)
    targets = torch.from_numpy(labels)
    torch.manual_seed(0)
    seeds = SEEDS[training.owner]
    notes = {"owner": training.owner, "seeds": [seeds.start, seeds.start + count - 1]}
    judge = ToyJudge(width=training.width, architecture=training.architecture, notes=notes)
    judge.train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2)
    budget, rng, step = Budget(minutes), np.random.default_rng(0), 0
    while budget.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * decayed(budget.fraction)
        pick = rng.integers(count, size=batch_size)
        logits = judge(degrade(to_tensor(pictures[pick])))
        wanted = targets[torch.from_numpy(pick)]
        loss = len(judge.labels) * nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"judge {budget.spent:5.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
    judge.eval()
    result = check_judge(judge)
    worn = check_judge(judge, degraded=True)
    cut = check_judge(judge, hybrids=1.0)
    judge.notes.update(accuracy=result, accuracy_blurred_noisy=worn, accuracy_half_erased=cut)
    judge.save_pretrained(target)
    return result
