"""Makes data/toyworld/clip: trains, measures on scenes that no training saw, writes the folder with its README."""

import json
from pathlib import Path
from typing import Any

from transformers import CLIPModel, CLIPTokenizer

from lit_safety.toyworld.clip import save_clip
from lit_safety.toyworld.clip_checks import fresh_scenes, probe, ranking, retrieval
from lit_safety.toyworld.clip_training import train_clip
from lit_safety.toyworld.seeds import SEEDS
from lit_safety.toyworld.tokenizer import build_tokenizer

CHECKS = 3_000_000
"""First of the scenes of range "checks" that measure CLIP."""

_NOTES = """# CLIP of the toy world

A `transformers` CLIPModel for 32x32 pictures, trained from scratch on drawn scenes and their captions by
`python -m lit_safety toyworld build --stages '[clip]'`. Made to be the frozen backbone of a cost model on the toy
world, and for CLIPScore there. It knows nothing else: words from outside mean nothing to it.

    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

Its training drew from seeds {first} to {last} (range "clip"; {families} families of scenes that differ in one thing).
{pictures:,} pictures were seen in {minutes:.0f} minutes of wall time. What follows was measured on scenes of the range
"checks", which nothing was trained on; lines and MLPs that tell harm were fitted on scenes of "cost_model".
`lit_safety.toyworld.clip_checks` says what each figure is.

```json
{figures}
```
"""


def measure_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int = 2000) -> dict[str, Any]:
    """Every figure of the README, on `count` fresh scenes."""
    fresh, learn = fresh_scenes("checks", CHECKS, count), fresh_scenes("cost_model", 0, 2 * count)
    return {
        "retrieval": retrieval(clip, tokenizer, fresh),
        "ranking": ranking(clip, tokenizer, fresh),
        "ranking_by_phrase": ranking(clip, tokenizer, fresh, implicit=True),
        "harm_pooled": probe(clip, learn, fresh)[0],
        "harm_projected": probe(clip, learn, fresh, projected=True)[0],
    }


def make_clip(work: Path, target: Path, minutes: float, processes: int, families: int = 12_000) -> None:
    """Trains, measures and writes the folder `target`."""
    clip, trained = train_clip(work, minutes, families, world=processes)
    figures = measure_clip(clip, build_tokenizer(work / "clip_tokenizer"))
    notes = _NOTES.format(
        first=SEEDS["clip"].start,
        last=SEEDS["clip"].start + families - 1,
        families=families,
        figures=json.dumps(figures, indent=1),
        **trained,
    )
    save_clip(clip, target, notes)
    found = figures["retrieval"]
    print(f"clip: {found['to_text']:.1%} of {found['n']} fresh pictures find their caption")
