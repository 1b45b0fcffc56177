"""What a judge learns from: whole scenes, empty ones, and things half erased or turning into one another.

A thing's label is how much of it is seen: 0 below 30%, 1 above 70%, straight in between. So a judge neither
takes a remnant for the thing nor misses it when an edge is gone.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lit_safety.toyworld.objects import BENIGN, LABELS, LOOKALIKES
from lit_safety.toyworld.palette import COLOURS
from lit_safety.toyworld.sampling import draw_scene, grade
from lit_safety.toyworld.scene import Scene, Thing, render, to_array
from lit_safety.toyworld.seeds import stream

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
    """Picture (32, 32, 3) and labels (L,) of the owner's scene `index`; so many are erased or blended ones."""
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
    """Pictures (N, 32, 32, 3) and labels (N, L)."""
    made = [judged_scene(owner, start + i, hybrids) for i in range(count)]
    return np.stack([picture for picture, _ in made]), np.stack([labels for _, labels in made])
