"""`lit_safety shards generate`, and its journal of batches, by which a resumed run does not draw samples again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.core.files import append_line, write_atomic
from lit_safety.core.hashes import digest
from lit_safety.core.text import load_json
from lit_safety.drawing.pipelines import PainterSettings
from lit_safety.generation.pairs import Scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_safety.data.format.writer import ShardWriter
    from lit_safety.generation.pairs import PairMaker, PromptPair


FILE_NAME = "generated.jsonl"
KEPT = "kept"


class Outcomes:
    """The lines of `folder/generated.jsonl`, one for each finished batch; the first holds the run's settings.

    Args:
        folder: of the shards.
        settings: can be written as JSON; lines of a run with other settings are deleted.
        fresh: delete earlier lines in any case.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = folder / FILE_NAME
        self._batches: dict[int, dict[str, str]] = {}
        run = json.dumps({"run": digest(dict(settings))}).encode() + b"\n"
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() and not fresh else []
        whole = run
        for line in lines[1:] if lines[:1] == [run] else []:
            try:
                noted = load_json(line)
                self._batches[int(noted["batch"])] = dict(noted["samples"])
            except (ValueError, KeyError, TypeError):
                break  # a kill cut the line short: that batch is drawn again
            whole += line
        write_atomic(self.path, whole)

    def kept(self, batch: int) -> list[str] | None:
        """The keys of a batch's samples; None: it was not finished."""
        done = self._batches.get(batch)
        return None if done is None else [key for key, what in done.items() if what == KEPT]

    def note(self, batch: int, samples: Mapping[str, str]) -> None:
        """Note a finished batch: for each sample `kept` or why it was left out."""
        self._batches[batch] = dict(samples)
        append_line(self.path, json.dumps({"batch": batch, "samples": self._batches[batch]}))

    def counts(self) -> Counter[str]:
        """Reasons why samples were left out, and how often."""
        return Counter(what for done in self._batches.values() for what in done.values() if what != KEPT)


# `lit_safety shards generate`: safety pairs drawn by the model that will be aligned.


def generate(
    prompts: str,
    pipeline: str,
    out: str,
    judge: str | None = None,
    cost_model: str | None = None,
    counterpart: Literal["img2img", "same_seed"] = "img2img",
    strength: float = 0.8,
    both_prompts: bool = False,
    clean_candidates: int = 0,
    scorer: Scorer | None = None,
    adapter: str | None = None,
    seed: int = 0,
    samples_per_shard: int = 256,
    rank: int | None = None,
    world: int | None = None,
    overwrite: bool = False,
    other_world: bool = False,
    per_prompt: int = 2,
    **drawing: Any,
) -> None:
    """Draw safety pairs with a text-to-image pipeline and write them as shards.

    For each row of the table the harmful prompt's image is rejected and a safe counterpart is chosen. A judge, a cost
    model or both check every image. A pair is left out and counted if the rejected image is not harmful, the chosen one
    is harmful, or their costs are in the wrong order. With `clean_candidates`, a scorer ranks safe images of the safe
    prompt, and the best and the worst become a pair ordered by quality.

    Several processes can share the work, started by `torchrun` or each with its own --rank and --world. Each writes its
    shards into its own folder below `out`, and the last one writes the manifest of all (as `shards join` does). The
    images depend on the prompts and seeds, not on the number of processes. A stopped run continues when it is started
    again with the same settings.

    Args:
        prompts: CSV with the columns harmful_prompt, safe_prompt, category and, optionally, concept and seed.
        pipeline: Folder or hub id of a diffusers text-to-image pipeline: the model to be aligned.
        out: The folder to write the shards to.
        judge: Folder of a judge that says which images are harmful.
        cost_model: Folder of an exported cost model; its costs are stored with the pairs.
        counterpart: How the safe image is made: `img2img` redraws the harmful image towards the safe prompt with the
            harmful prompt as negative; `same_seed` draws the safe prompt from the harmful image's seed.
        strength: With img2img: how much is redrawn, from 0 to 1. 0.75 to 0.8 keeps the scene and removes the harm.
        both_prompts: Write each such pair twice, under its harmful and under its safe prompt.
        clean_candidates: Images drawn for each safe prompt to make a pair ordered by quality; 0: no such pairs.
        scorer: What ranks them, and scores every pair's images; a class such as
            lit_safety.generation.ClipScorer.
        adapter: A LoRA to draw with.
        seed: With a row's prompts, gives the seed of rows without a seed.
        samples_per_shard: How many pairs a shard holds.
        rank: The number of this process, from 0; null: torchrun's.
        world: The number of processes; null: torchrun's.
        overwrite: Delete what an earlier run left in the folder.
        other_world: Use a judge or cost model of an embedded world, such as data/toyworld, for a model that is not of
            this world.
        per_prompt: Images of each harmful prompt: 2 make a pair, more a group of the safe counterpart and as many
            images of the harmful prompt from seeds of their own; safe candidates of a clean prompt stay together too.
            An image of a harmful prompt that shows no harm stays in its group as a safe one, but not all may be such.
        **drawing: How images are drawn, see `PainterSettings`; `batch_size` counts rows of the table.
    """
    from pathlib import Path

    from lit_safety.core.hashes import content_sha256, file_sha256
    from lit_safety.data.convert.join import join_when_done, part_name, this_device, this_rank
    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.pipelines import Painter, load_pipeline, local_pipeline
    from lit_safety.drawing.worlds import check_world
    from lit_safety.generation.pairs import Assessor, PairMaker, read_prompt_pairs

    rank, world = this_rank(rank, world)
    rows, repeated = read_prompt_pairs(prompts, seed)
    settings = PainterSettings(**drawing)
    device = this_device(settings.device)
    folder = local_pipeline(pipeline)
    check_world(folder, {"--judge": judge, "--cost_model": cost_model}, other_world)
    assessor = Assessor(judge, cost_model, device)
    assessor.check(dict.fromkeys(category for row in rows for category in row.categories), prompts)
    pipe = load_pipeline(folder, Arm(adapter=adapter), device, settings.precision)
    maker = PairMaker(
        Painter(pipe, settings, counterpart == "img2img"),
        assessor,
        scorer,
        counterpart,
        strength,
        both_prompts,
        clean_candidates,
        per_prompt,
    )
    provenance = {
        "command": "generate",
        "prompts_sha256": file_sha256(prompts),
        "pipeline": pipeline,
        "pipeline_sha256": content_sha256(folder),
        "adapter_sha256": None if adapter is None else content_sha256(adapter),
        "scheduler": type(pipe.scheduler).__name__,
        "counterpart": counterpart,
        "strength": strength if counterpart == "img2img" else None,
        "both_prompts": both_prompts,
        "clean_candidates": clean_candidates,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "resolution": settings.resolution,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "samples_per_shard": samples_per_shard,
        **assessor.settings,
        "scorer": None if scorer is None else scorer.settings,
    }
    if per_prompt != 2:
        provenance["per_prompt"] = per_prompt
    target = Path(out) if world == 1 else Path(out) / part_name(rank, world)
    if repeated and rank == 0:
        print(f"{prompts}: {repeated} rows repeat the prompts and seed of another row and are left out")
    _write(maker, rows, settings.batch_size, (rank, world), target, provenance, seed, overwrite)
    if world > 1:
        join_when_done(Path(out), world, provenance, {"seed": seed})


def _write(
    maker: PairMaker,
    rows: Sequence[PromptPair],
    batch_size: int,
    share: tuple[int, int],
    folder: Path,
    provenance: dict[str, Any],
    seed: int,
    overwrite: bool,
) -> None:
    """Write this rank's batches into its folder. Batches and their images are the same for any number of ranks."""
    from lit_safety.core.progress import counter
    from lit_safety.data.convert.join import save_empty
    from lit_safety.data.format.manifest import FILE_NAME, load_manifest
    from lit_safety.data.format.writer import ShardWriter

    if (folder / FILE_NAME).exists() and not overwrite:
        left = load_manifest(folder)
        if (left.provenance, left.seeds) != (provenance, {"seed": seed}):
            raise UserError(f"{folder}: already holds other shards; name another folder or give --overwrite true")
        print(f"{folder}: is already complete")
        return
    rank, world = share
    starts = range(rank * batch_size, len(rows), world * batch_size)
    options: dict[str, Any] = {"provenance": provenance, "seeds": {"seed": seed}, "overwrite": overwrite}
    with ShardWriter(folder, provenance["samples_per_shard"], resume=True, **options) as writer:
        outcomes = Outcomes(folder, provenance, fresh=overwrite)
        if len(writer):
            print(f"{folder}: continuing after {len(writer)} pairs")
        with counter("draw", sum(min(batch_size, len(rows) - start) for start in starts)) as count:
            for start in starts:
                batch, number = rows[start : start + batch_size], start // batch_size
                kept = outcomes.kept(number)
                if kept is None or not all(key in writer for key in kept):
                    outcomes.note(number, _draw(maker, batch, writer))
                for _ in batch:
                    count()
        for reason, times in sorted(outcomes.counts().items()):
            print(f"{folder}: left out {times} {reason}")
        if len(writer) == 0 and world > 1:
            save_empty(writer)  # other ranks may have found pairs
    print(f"{folder}: {len(writer)} pairs")


def _draw(maker: PairMaker, rows: Sequence[PromptPair], writer: ShardWriter) -> dict[str, str]:
    """For each sample of a batch `kept` or why it was left out. Samples of an earlier run are not written again."""
    from lit_safety.generation.pairs import Made

    noted = {}
    for made in maker(rows):
        noted[made.key] = KEPT if isinstance(made, Made) else made.reason
        if isinstance(made, Made) and made.key not in writer:
            writer.write_group(made.key, made.metadata, made.images)
    return noted
