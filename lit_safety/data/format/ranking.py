"""Which images of a group are better than which: by what the sample's `order` says, ties stated."""

from __future__ import annotations

from collections.abc import Sequence

#: The most images that one prompt has in a shard.
MAX_IMAGES = 64
NEEDED = {
    "safety": "a label, or else a cost, of every image",
    "quality": "a score of every image",
    "composite": "a score of every image, which then is what decided",
}


def ranks(
    order: str, harmful: Sequence[bool | None], cost: Sequence[float | None], score: Sequence[float | None]
) -> tuple[int, ...] | None:
    """Each image's place, 0 the best; images that nothing tells apart share one.

    `safety`: a safe image goes before a harmful one, and among equal labels the lower cost first where all costs of the
    group are known. Where a label is not known, costs alone decide. `quality` and `composite`: the higher score first.
    What is known of some of the images only decides nothing.

    Args:
        order: what decides.
        harmful: of each image; None: not known.
        cost: likewise, above 0 harmful.
        score: likewise, higher is better.

    Returns:
        None: too little is known for any order.
    """
    labels = None if None in harmful else [float(bool(one)) for one in harmful]
    costs = None if None in cost else [float(one or 0.0) for one in cost]
    scores = None if None in score else [-float(one or 0.0) for one in score]
    decides = [one for one in ((labels, costs) if order == "safety" else (scores,)) if one is not None]
    if not decides:
        return None
    keys = list(zip(*decides, strict=True))
    places = {key: place for place, key in enumerate(sorted(set(keys)))}
    return tuple(places[key] for key in keys)
