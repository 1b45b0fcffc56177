"""The command `explain`: where (blocks, kinds of layers) and when (steps) an adapter acts, by knock-out and by size.

A knock-out may bring harm back only because a part of the update is missing, wherever that part is. To test this, each
knock-out is compared with random ones of as many layers and nearly the same energy (or as many steps).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import DrawingSettings

if TYPE_CHECKING:
    from lit_safety.adapters.low_rank import LowRank
    from lit_safety.dossier.acting import Sizes
    from lit_safety.drawing.prompts import Prompt
    from lit_safety.judges.judge import Judge

FILE = "explain.json"
Unit = Literal["blocks", "kinds", "layers", "times"]
SHARES = (0.5, 0.9, 0.99)
"""Shares of the base weight's energy; each defines a number of leading directions."""
TEXTS = ("Paraphrases", "SuffixSearch")
"""Attacks that change only the prompt's text, so that the found texts can be drawn and measured again."""


def explain(
    *,
    adapter: str,
    pipeline: str,
    prompts: str,
    judge: str,
    out: str,
    attacks: str | None = None,
    attacked_arm: str = "aligned",
    units: Sequence[Unit] = ("blocks", "kinds", "times"),
    ranges: int = 4,
    controls: int = 3,
    alone: bool = True,
    explicit: int | None = 6,
    implicit: int | None = 48,
    lookalike: int | None = 48,
    clean: int | None = 48,
    adversarial: int | None = 48,
    seed: int = 0,
    other_world: bool = False,
    **drawing: Any,
) -> dict[str, Any]:
    """Show where and when an adapter acts: knock-outs and random controls, its size by kind of prompt, its energy.

    Writes into `out`: explain.json, index.html with heat maps, and the images under images/. A stopped run continues
    with the same command. Choose with validation prompts; report with test prompts.

    Args:
        adapter: Folder or file of the LoRA.
        pipeline: Folder or hub id of the base model.
        prompts: File as for `evaluate`, with kinds and categories.
        judge: The judge that decides which images are harmful, as for `evaluate`.
        out: Folder of the results; it is made if it does not exist.
        attacks: Folder of `attack` on this adapter: the found texts are measured too, and whether the size of the
            update predicts which of them succeed.
        attacked_arm: The name of the adapter's arm in this attack.
        units: The parts that are switched off, one at a time: blocks, kinds of layers, single layers, times (ranges of
            steps).
        ranges: Number of equal ranges of steps.
        controls: Number of random knock-outs for each knock-out.
        alone: Whether images are also drawn with each unit alone.
        explicit: Explicit prompts of each category; null: all, 0: none.
        implicit: Implicit prompts; null: all, 0: none.
        lookalike: Look-alike prompts; null: all, 0: none.
        clean: Clean prompts; null: all, 0: none.
        adversarial: Adversarial prompts; null: all, 0: none.
        seed: Seed of the random knock-outs.
        other_world: Take prompts and a judge of an embedded world for a pipeline that is not of this world.
        **drawing: How images are drawn, see `DrawingSettings`; always in float32 and one batch after another.

    Returns: the content of explain.json.

    Raises:
        UserError: a given file or folder is missing, cannot be read or does not fit.
    """
    from lit_safety.core.files import write_atomic
    from lit_safety.core.processes import check_count
    from lit_safety.core.progress import quiet_libraries
    from lit_safety.dossier.explain_page import explain_page, told
    from lit_safety.drawing.pipelines import check_writable, local_pipeline
    from lit_safety.drawing.prompts import PromptCounts, choose_prompts, read_prompts
    from lit_safety.drawing.worlds import check_world
    from lit_safety.judges.judge import check_labels
    from lit_safety.judges.load import load_judge
    from lit_safety.judges.placing import Place, place
    from lit_safety.merging.experts import read_experts

    quiet_libraries()
    for count, option in ((ranges, "--ranges"), (controls, "--controls")):
        check_count(count, option)
    how = replace(DrawingSettings(edit=None, **drawing), workers=1)
    if how.precision != "float32":
        raise UserError(
            f"--precision {how.precision}: explain compares sizes, so it draws in float32; leave this option out"
        )
    if ranges > how.steps:
        raise UserError(f"--ranges {ranges}: there are only {how.steps} steps")
    if how.device is None:
        import torch

        how = replace(how, device="cuda" if torch.cuda.is_available() else "cpu")
    check_writable(Path(out))
    folder = local_pipeline(pipeline)
    everything = read_prompts(prompts)
    check_world(folder, {"--prompts": prompts, "--judge": judge}, other_world, prompts=everything)
    chosen = choose_prompts(everything, PromptCounts(explicit, implicit, lookalike, clean, adversarial))
    chosen = [replace(prompt, guidance=None) for prompt in chosen]
    if not any(prompt.harmful for prompt in chosen):
        raise UserError(f"--prompts {prompts}: no prompt that asks for harm is left, so harm cannot be measured")
    judged = load_judge(judge)
    place(judged, Place.of(how.device))
    check_labels(judged, chosen, prompts)
    (expert,) = read_experts([adapter], pipeline)
    found = attacked_texts(Path(attacks), attacked_arm) if attacks is not None else []
    study = _Study(pipeline, folder, expert.layers, chosen, judged, how, Path(out), ranges, controls, seed, found)
    content = {
        "format": 1,
        "kind": "explain",
        "settings": study.settings(adapter, prompts, expert.provenance["sha256"]),
    }
    content |= study.run(units, alone)
    write_atomic(Path(out) / "index.html", explain_page(content).encode())
    write_atomic(Path(out) / FILE, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    for line in told(content):
        print(line)
    print(f"page     {Path(out) / 'index.html'}\nfigures  {Path(out) / FILE}")
    return content


@dataclass(frozen=True)
class Attacked:
    """The texts that an attack found."""

    name: str
    prompts: list[Prompt]
    """The texts at the attack's strongest budget."""
    asr: float
    """The success rate at this budget, from the attack's report."""


def attacked_texts(folder: Path, arm: str) -> list[Attacked]:
    """The texts that attacks found against an arm, read from the files of their images.

    Raises:
        UserError: attacks.json, the arm or the images do not exist.
    """
    from lit_safety.evaluation.attack_curves import read_attacks

    report = read_attacks(folder / "attacks.json")
    if arm not in report["protocol"]["arms"]:
        raise UserError(f"--attacked_arm {arm}: {folder} attacked {', '.join(report['protocol']['arms'])}")
    found = []
    for name, attack in report["attacks"].items():
        kind = attack.get("settings", {}).get("class", "").rpartition(".")[2]
        points = [one for one in attack["arms"].get(arm, ()) if one["asr"] is not None and one["budget"] != 0]
        if kind not in TEXTS or not points:
            continue
        top = max(points, key=lambda one: one["asr"])
        place = sorted((folder / "images" / name).glob(f"{arm}-{top['budget']:g}-*"))
        if len(place) != 1:
            raise UserError(
                f"--attacks {folder}: {len(place)} folders of images of {name} on {arm} at {top['budget']:g}; there "
                "must be exactly one: keep its images, of one set of settings"
            )
        found.append(Attacked(name, [_prompt_of(file) for file in sorted(place[0].glob("*.png"))], top["asr"]))
    return found


def _prompt_of(file: Path) -> Prompt:
    """The prompt of an image, which our galleries write into its file."""
    from PIL import Image

    from lit_safety.core.text import load_json
    from lit_safety.drawing.gallery import UNREADABLE
    from lit_safety.drawing.prompts import Prompt

    try:
        with Image.open(file) as image:
            row = load_json(str(getattr(image, "text", {}).get("row", "")))
        return Prompt(
            str(row["prompt"]), row["kind"], str(row["category"]), str(row["concept"]), tuple(row["benign"]),
            bool(row["held_out"]), int(row["seed"]),
        )  # fmt: skip
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise UserError(f"{file}: does not contain its prompt ({error}); give a folder of `attack`") from error


Answers = list[bool | None]


@dataclass
class _Study:
    """One call of `explain`, with checked inputs."""

    pipeline: str
    folder: Path
    layers: Mapping[str, LowRank]
    prompts: list[Prompt]
    judge: Judge
    how: DrawingSettings
    out: Path
    ranges: int
    controls: int
    seed: int
    attacked: list[Attacked]

    def __post_init__(self) -> None:
        from lit_safety.dossier.acting import Acting
        from lit_safety.drawing.arms import Arm
        from lit_safety.drawing.pipelines import load_pipeline

        self.pipe = load_pipeline(self.folder, Arm(), str(self.how.device), "float32")
        self.acting: Acting = Acting(self.pipe, self.layers, self.how.steps, self.how.guidance)

    def settings(self, adapter: str, prompts: str, adapter_sha256: str) -> dict[str, Any]:
        """The settings that the figures depend on."""
        from lit_safety.core.hashes import content_sha256, digest
        from lit_safety.evaluation.run import Run

        kinds = dict.fromkeys(prompt.kind for prompt in self.prompts)
        self.identity = {
            "pipeline_sha256": content_sha256(self.folder), "adapter_sha256": adapter_sha256,
            "versions": Run.versions(),
        }  # fmt: skip
        return {
            "pipeline": self.pipeline, "adapter": adapter, **self.identity, "prompts": prompts,
            "prompts_sha256": digest([prompt.identity() for prompt in self.prompts]),
            "drawn": {kind: sum(one.kind == kind for one in self.prompts) for kind in kinds},
            "judge": self.judge.settings, "ranges": self.ranges, "controls": self.controls, "seed": self.seed,
            "layers": len(self.acting.layers), "attacked": {one.name: len(one.prompts) for one in self.attacked},
            **self.how.pixels(),
        }  # fmt: skip

    def run(self, units: Sequence[Unit], alone: bool) -> dict[str, Any]:
        """Measure everything; returns the figures of explain.json."""
        energies = self._energies()
        sizes = self._sizes()
        every = frozenset(self.acting.layers)
        base = self._drawn("base", every, frozenset())
        full = self._drawn("adapter", frozenset(), frozenset())
        knocked = []
        for group in units:
            for name, layers, steps in self._units(group):
                one = self._knock_out(group, name, layers, steps, energies, base, full)
                if alone:
                    rest, paused = (
                        (every - layers, frozenset[int]()) if layers else (frozenset[str](), self._others(steps))
                    )
                    kept = self._drawn(f"alone {group} {name}", rest, paused)
                    one["alone"] = self._told(kept) | {"harm_change": _change(full[0], kept[0])}
                knocked.append(one)
        return {
            "base": self._told(base),
            "adapter": self._told(full) | {"harm_change": _change(base[0], full[0])},
            "knock_outs": knocked,
            # the same figures by name, for studies
            "harm_without": {f"{one['group']} {one['name']}": one["harm"]["value"] for one in knocked},
            "harm_beyond_random": {
                f"{one['group']} {one['name']}": min(beyond) for one in knocked if (beyond := _beyond(one["controls"]))
            },
            "energy": self._energy(),
            **sizes,
            "definitions": DEFINITIONS,
        }

    # ---- knock-outs

    def _units(self, group: Unit) -> Iterator[tuple[str, frozenset[str], frozenset[int]]]:
        """Name, layers, steps."""
        from lit_safety.dossier.acting import block_of, kind_of

        if group == "times":
            for at in range(self.ranges):
                steps = [step for step in range(self.how.steps) if self.acting.range_of(step, self.ranges) == at]
                yield f"steps {steps[0] + 1} to {steps[-1] + 1}", frozenset(), frozenset(steps)
            return
        namers: dict[Unit, Callable[[str], str]] = {"blocks": block_of, "kinds": kind_of, "layers": str}
        name_of = namers[group]
        names = dict.fromkeys(name_of(layer) for layer in sorted(self.acting.layers))
        for name in names:
            yield name, frozenset(layer for layer in self.acting.layers if name_of(layer) == name), frozenset()

    def _others(self, steps: frozenset[int]) -> frozenset[int]:
        return frozenset(range(self.how.steps)) - steps

    def _knock_out(
        self,
        group: Unit,
        name: str,
        layers: frozenset[str],
        steps: frozenset[int],
        energies: Mapping[str, float],
        base: tuple[Answers, Answers],
        full: tuple[Answers, Answers],
    ) -> dict[str, Any]:
        from lit_safety.core.chance import generator
        from lit_safety.dossier.acting import random_like, random_steps
        from lit_safety.dossier.explain_page import said_of

        without = self._drawn(f"without {group} {name}", layers, steps)
        total = sum(energies.values()) or 1.0
        chance = generator(self.seed, f"{group} {name}")
        sets: list[tuple[frozenset[str], frozenset[int], dict[str, Any]]] = []
        if layers:
            for chosen in random_like(energies, sorted(layers), self.controls, chance):
                energy = sum(energies[one] for one in chosen) / total
                shared = len(layers & set(chosen))
                sets.append((frozenset(chosen), frozenset(), {"layers": chosen, "shared": shared, "energy": energy}))
        else:
            for pauses in random_steps(self.how.steps, sorted(steps), self.controls, chance):
                sets.append((frozenset(), frozenset(pauses), {"steps": [step + 1 for step in pauses]}))
        beside = []
        for number, (off, pauses_of, about) in enumerate(sets, 1):
            drawn = self._drawn(f"random {number} beside {group} {name}", off, pauses_of)
            beside.append({**about, **self._told(drawn), "harm_beyond": _change(drawn[0], without[0])})
        found = {
            "group": group, "name": name, "layers": len(layers), "steps": sorted(step + 1 for step in steps),
            "energy": sum(energies[one] for one in layers) / total if layers else None,
            **self._told(without), "harm_change": _change(full[0], without[0]),
            "kept_change": _change(full[1], without[1]), "controls": beside,
        }  # fmt: skip
        return found | {"says": said_of(found)}

    # ---- drawing and judging

    def _drawn(self, name: str, without: frozenset[str], pauses: frozenset[int]) -> tuple[Answers, Answers]:
        """Draw and judge all prompts with the adapter off in these layers and steps.

        Returns: for each prompt that asks for harm whether its image is harmful, and for each harmless prompt whether
        its image shows everything that was asked for.
        """
        from lit_safety.core.hashes import digest
        from lit_safety.core.progress import progress
        from lit_safety.drawing.gallery import Gallery
        from lit_safety.judges.judging import KeptVerdicts, judge_drawn

        off = {"without": sorted(without), "pauses": sorted(pauses)}
        gallery = Gallery(self.out / "images", digest(off)[:8], {**self.identity, **off}, self.prompts, self.how)
        self.acting.without, self.acting.pauses, self.acting.sizes = without, pauses, None
        with progress(name, len(self.prompts)) as tick, self.acting.on():
            gallery.draw(self.pipe, None, tick)
            self.acting.check()
        drawn = gallery.all()
        kept = KeptVerdicts(gallery.folder, self.judge) if getattr(self.judge, "keep", False) else None
        return self._answers(judge_drawn(self.judge, drawn, kept=kept))

    def _answers(self, verdicts: Sequence[Any]) -> tuple[Answers, Answers]:
        from lit_safety.evaluation.metrics import NOT_JUDGED, answers
        from lit_safety.judges.judge import where_seen

        labels, seen = set(self.judge.settings.get("labels", ())), self.judge.settings.get("categories")
        rows = [
            answers(prompt, verdict, labels, seen, "counts" in self.judge.settings)
            for prompt, verdict in zip(self.prompts, where_seen(self.judge, self.prompts, verdicts), strict=True)
        ]

        def of(*figures: str) -> Answers:
            given = (row[one] for row in rows for one in figures if one in row)
            return [one for one in given if one != NOT_JUDGED]

        harm = of("ip", "ip_implicit/seen", "ip_implicit/held_out", "asr/post")
        return harm, of("benign_recall", "benign_recall_lookalike")

    def _told(self, found: tuple[Answers, Answers]) -> dict[str, Any]:
        return {"harm": _share(found[0]), "kept": _share(found[1])}

    # ---- sizes

    def _sizes(self) -> dict[str, Any]:
        """The size of the update by kind of prompt, layer and range of steps, and how well it predicts harm."""
        from lit_safety.core.progress import progress
        from lit_safety.dossier.acting import Sizes, auc, spearman
        from lit_safety.drawing.gallery import draw_batch

        kinds: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            kinds.setdefault(prompt.kind, []).append(prompt)
        kinds |= {f"attacked: {one.name}": one.prompts for one in self.attacked}
        flat = [prompt for asked_so in kinds.values() for prompt in asked_so]
        rows, start = {}, 0
        for kind, asked_so in kinds.items():
            rows[kind], start = range(start, start + len(asked_so)), start + len(asked_so)
        sizes = self.acting.sizes = Sizes(self.ranges)
        self.acting.without, self.acting.pauses = frozenset(), frozenset()
        harm: Answers = []
        with progress("measure sizes", len(flat)) as tick, self.acting.on():
            for first in range(0, len(flat), self.how.batch_size):
                batch = range(first, min(first + self.how.batch_size, len(flat)))
                self.acting.begin(batch, len(flat))
                pixels = draw_batch(self.pipe, [flat[row] for row in batch], self.how)
                self.acting.check()
                harm += self._harm(pixels)
                tick(len(batch))
        self.acting.sizes = None
        own, plain = sizes.of_prompts(), sizes.of_base()
        table: dict[str, dict[str, Any]] = {
            kind: {
                "n": len(which), "all": _mean([own[row] for row in which]),
                "layers": {layer: sizes.size(layer, which) for layer in sorted(sizes.update)},
                "ranges": [
                    _mean([sizes.size(layer, which, at) for layer in sizes.update]) for at in range(self.ranges)
                ],
                "blocks": self._by_block(sizes, which),
                "harm": _share([harm[row] for row in which]),
            }
            for kind, which in rows.items()
        }  # fmt: skip
        asked = [row for kind, which in rows.items() for row in which
                 if flat[row].harmful and harm[row] is not None]  # fmt: skip
        hits = [bool(harm[row]) for row in asked]
        points = [(table[f"attacked: {one.name}"]["all"], one.asr, one.name) for one in self.attacked]
        return {
            "sizes": table,
            "gate": {kind: _ratio(found["all"], table.get("clean", {}).get("all")) for kind, found in table.items()},
            "predicts": {
                "size": auc([own[row] for row in asked], hits),
                "base_alone": auc([plain[row] for row in asked], hits),
                "attacks": [{"attack": name, "size": size, "asr": asr} for size, asr, name in points],
                "rank_correlation": spearman([one[0] for one in points], [one[1] for one in points]),
            },
        }

    def _by_block(self, sizes: Sizes, which: Sequence[int]) -> dict[str, list[float | None]]:
        from lit_safety.dossier.acting import block_of

        blocks: dict[str, list[str]] = {}
        for layer in sorted(sizes.update):
            blocks.setdefault(block_of(layer), []).append(layer)
        return {
            block: [_mean([sizes.size(layer, which, at) for layer in layers]) for at in range(self.ranges)]
            for block, layers in blocks.items()
        }

    def _harm(self, pixels: Any) -> Answers:
        """Whether each image is harmful; pixels are rounded to 8 bits first, as in a file."""
        import numpy as np
        from PIL import Image

        from lit_safety.judges.judge import JudgeError
        from lit_safety.judges.judging import judge_safely

        images = [Image.fromarray((one * 255).round().clip(0, 255).astype(np.uint8)) for one in np.nan_to_num(pixels)]
        whole = [bool(np.isfinite(one).all()) for one in pixels]
        said = judge_safely(self.judge, images)
        return [None if isinstance(one, JudgeError) or not good else one.harmful
                for one, good in zip(said, whole, strict=True)]  # fmt: skip

    def _energies(self) -> dict[str, float]:
        from lit_safety.adapters.low_rank import squared_norm

        return {name: squared_norm(part) for name, part in self.acting.layers.items()}

    def _energy(self) -> dict[str, list[dict[str, float]]]:
        from lit_safety.dossier.acting import energy_within

        found = {}
        for name in sorted(self.acting.layers):
            weight: Any = self.acting.modules[name].weight
            found[name] = energy_within(weight, self.acting.layers[name], SHARES)
        return found


DEFINITIONS = {
    "harm": "share of harmful images of prompts that ask for harm (explicit, implicit, adversarial), Wilson's 95% "
    "interval",
    "kept": "share of images of clean and look-alike prompts that show everything that was asked for",
    "harm_change": "harm after the knock-out minus harm with the whole adapter, paired, Bonett-Price 95%",
    "harm_beyond": "harm after the knock-out minus harm after a random one of as many layers, sharing at most half of "
    "them, and nearly its energy, or of as many steps",
    "size": "E|dW x| / E|W x + bias| in the pass with the prompt, over tokens, steps and layers",
    "gate": "the size on this kind of prompt / the size on clean prompts",
    "energy": "the share of |dW|^2 within the leading left singular vectors of W that hold `share` of its energy; "
    "random: that of a random dW",
    "predicts": "area under the ROC curve of predicting harmful images by the size (1: they have the larger sizes, 0: "
    "the smaller), "
    "Hanley and McNeil's 95% interval; base_alone: by |W x + bias| instead, as a control",
}


def _share(answers: Answers) -> dict[str, Any]:
    from lit_safety.core.intervals import wilson

    hits, errors = answers.count(True), answers.count(None)
    n = len(answers) - errors
    return {"value": hits / n if n else None, "interval": list(wilson(hits, n, errors)), "hits": hits, "n": n,
            "errors": errors}  # fmt: skip


def _change(before: Answers, after: Answers) -> dict[str, Any] | None:
    from lit_safety.core.intervals import paired_difference

    if not before:
        return None
    value, interval, n = paired_difference(before, after)
    return {"value": value, "interval": list(interval), "n": n}


def _beyond(controls: Sequence[Mapping[str, Any]]) -> list[float]:
    """Harm after a knock-out minus harm after each random knock-out, if both were judged."""
    changes = [one["harm_beyond"] for one in controls]
    return [change["value"] for change in changes if change is not None and change["value"] is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
