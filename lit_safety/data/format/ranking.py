"""The ranking of a group's images by the sample's `order`, with ties."""

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
    """Each image's rank, 0 is the best; images without a known difference have the same rank.

    `safety`: safe images come before harmful ones, and among equal labels the lower cost comes first if all costs of
    the group are known. If a label is unknown, only costs decide. `quality` and `composite`: the higher score comes
    first. A value that is known for only some of the images is not used.

    Args:
        order: what decides the ranking.
        harmful: the label of each image; None: unknown.
        cost: the cost of each image, above 0 harmful; None: unknown.
        score: the score of each image, higher is better; None: unknown.

    Returns:
        None: too little is known for a ranking.
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
