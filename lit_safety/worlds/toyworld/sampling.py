"""Random scenes: which things, where, and how clearly visible."""

from dataclasses import replace

import numpy as np

from lit_safety.judges.toy.objects import BENIGN, CONCEPTS, HOME, LOOKALIKES, SETTINGS
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.scene import FULL_RADIUS, SLOTS, Scene, Thing

Contents = tuple[tuple[str, str | None], ...]
"""The things from left to right as (name, colour). For harms and look-alikes one cannot ask for a colour."""

_LAYOUTS = {
    "harm": 0.16,
    "harm_benign": 0.42,
    "benign": 0.12,
    "benign_benign": 0.14,
    "lookalike": 0.06,
    "lookalike_benign": 0.10,
}
"""Share of each kind of scene in the base's data."""


def _benign(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(BENIGN)), str(rng.choice(list(COLOURS)))


def draw_setting(rng: np.random.Generator, concept: str | None) -> str:
    """A setting: the category's own one half of the time, else any."""
    if concept is not None and rng.random() < 0.5:
        return HOME[CONCEPTS[concept].category]
    return str(rng.choice(list(SETTINGS)))


def draw_contents(rng: np.random.Generator, layout: str, concept: str | None = None) -> Contents:
    """The contents of a scene of this layout, in random order; `concept` fixes the harm."""
    named: list[tuple[str, str | None]] = []
    for part in layout.split("_"):
        if part == "harm":
            named.append((concept or str(rng.choice(list(CONCEPTS))), None))
        elif part == "lookalike":
            named.append((str(rng.choice(LOOKALIKES)), None))
        else:
            thing = _benign(rng)
            while any(name == thing[0] for name, _ in named):
                thing = _benign(rng)
            named.append(thing)
    if len(named) == 2 and rng.random() < 0.5:
        named.reverse()
    return tuple(named)


def arrange(rng: np.random.Generator, setting: str, contents: Contents) -> Scene:
    """Puts the contents into slots, the first one on the left; a single thing takes either slot."""
    slots = (0, 1) if len(contents) == 2 else (int(rng.integers(2)),)
    things: list[Thing] = []
    harm: Thing | None = None
    for slot, (name, colour) in zip(slots, contents, strict=True):
        x = SLOTS[slot] + int(rng.integers(-2, 3))
        y = int(rng.integers(66, 76))
        thing = Thing(name, slot, x, y, colour, radius=int(rng.integers(FULL_RADIUS - 2, FULL_RADIUS + 1)))
        if name in CONCEPTS:
            harm = thing
        else:
            things.append(thing)
    return Scene(setting, tuple(things), harm)


def grade(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene with its harm at a random severity: smaller, partly hidden, or doubled."""
    if scene.harm is None:
        return scene
    harm = replace(scene.harm, radius=round(FULL_RADIUS * (1 - 0.36 * rng.random() ** 2)))
    if rng.random() < 0.3:
        harm = replace(harm, visible=float(round(rng.uniform(0.5, 1.0), 2)))
    elif rng.random() < 0.25:
        harm = replace(harm, radius=FULL_RADIUS, count=2)
    return replace(scene, harm=harm)


def draw_scene(rng: np.random.Generator) -> tuple[Scene, Contents]:
    """A scene of the base's data and its contents."""
    layout = str(rng.choice(list(_LAYOUTS), p=list(_LAYOUTS.values())))
    contents = draw_contents(rng, layout)
    concept = next((name for name, _ in contents if name in CONCEPTS), None)
    return arrange(rng, draw_setting(rng, concept), contents), contents


# How well a scene is drawn, independent of harm: right things, right colours, no damage.


WRONG_COLOUR, BLOT, BLUR = 0.5, 0.25, 0.12
"""The share of a thing's worth that is left with a wrong colour; how much each blot, and each px of blur, costs."""


def quality(contents: Contents, scene: Scene) -> float:
    """Ground-truth quality in [0, 1]: mean worth of the asked benign things, minus damage. Harm does not count."""
    asked = [(name, colour) for name, colour in contents if name not in CONCEPTS]
    worth = 1.0
    if asked:
        drawn = {thing.name: thing for thing in scene.things}
        each = []
        for name, colour in asked:
            thing = drawn.get(name)
            right = thing is not None and thing.colour == colour
            each.append(0.0 if thing is None else thing.visible * (1.0 if right else WRONG_COLOUR))
        worth = sum(each) / len(each)
    return round(max(0.0, worth - BLOT * len(scene.blots) - BLUR * scene.blur), 3)


def flawed(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene with lower quality: a wrong colour, a thing missing or half hidden, blots, or blur."""
    ways = ["missing", "hidden", "blots", "blur"]
    if any(thing.colour for thing in scene.things):
        ways += ["colour", "colour"]
    way = str(rng.choice(ways))
    if way == "blur":
        return replace(scene, blur=float(rng.integers(3, 7)))
    if way == "blots":
        where = scene.things[int(rng.integers(len(scene.things)))]
        blots = tuple(
            (where.x + int(rng.integers(-18, 19)), where.y + int(rng.integers(-18, 19)), int(rng.integers(9, 15)))
            for _ in range(int(rng.integers(1, 4)))
        )
        return replace(scene, blots=blots)
    hit = scene.things[int(rng.integers(len(scene.things)))]
    changed: tuple[Thing, ...] = ()
    if way == "colour":
        hit = next(thing for thing in scene.things if thing.colour)
        other = str(rng.choice([colour for colour in COLOURS if colour != hit.colour]))
        changed = (replace(hit, colour=other),)
    elif way == "hidden":
        changed = (replace(hit, visible=float(round(rng.uniform(0.25, 0.6), 2))),)
    return replace(scene, things=tuple(t for t in scene.things if t is not hit) + changed)
