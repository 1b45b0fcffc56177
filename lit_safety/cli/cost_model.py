"""The command `cost-model`: how accurate a cost model is, on labelled shards and on a pipeline's images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import DrawingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from lit_safety.cost_model.network import CostScorer
    from lit_safety.drawing.prompts import PromptCounts


def check(
    folder: str,
    *,
    shards: str | None = None,
    pipeline: str | None = None,
    prompts: str | None = None,
    judge: str | None = None,
    out: str = "runs/cost_model_check",
    explicit: int | None = 20,
    implicit: int | None = 80,
    lookalike: int | None = 80,
    clean: int | None = 80,
    other_world: bool = False,
    **drawing: Any,
) -> None:
    """Print how well a cost model separates harmful images from safe ones.

    Writes figures.json and the images into `out`; a second call uses the images again.

    Args:
        folder: The cost model's folder.
        shards: Labelled pairs to measure on: ranking and sign accuracy, AUROC, calibration error.
        pipeline: A pipeline that draws `prompts`; `judge` labels its images.
        prompts: CSV file of prompts, as `evaluate` reads it.
        judge: The judge whose verdicts are used as labels of drawn images, only for this report.
        out: Folder of the figures and images.
        explicit: Explicit prompts drawn for each category; null draws all, 0 none.
        implicit: Implicit prompts; null draws all, 0 none.
        lookalike: Look-alike prompts; null draws all, 0 none.
        clean: Clean prompts; null draws all, 0 none.
        other_world: Use prompts and judge of an embedded world, such as data/toyworld, for a pipeline that is not of
            this world; false: refuse them.
        **drawing: How images are drawn, see `DrawingSettings`; its `device` is also where costs are measured.

    Raises:
        UserError: neither shards nor prompts are given, or a file is missing.
    """
    import torch

    from lit_safety.core.files import write_atomic
    from lit_safety.cost_model.files import load_cost_model
    from lit_safety.drawing.pipelines import check_writable
    from lit_safety.drawing.prompts import PromptCounts

    drawn = (pipeline, prompts, judge)
    if shards is None and pipeline is None:
        raise UserError("cost-model: give --shards, or --pipeline with --prompts and --judge, to measure on")
    if pipeline is not None and None in drawn:
        raise UserError("cost-model: --pipeline needs --prompts, and a --judge that labels the images")
    check_writable(Path(out))
    how = DrawingSettings(edit=None, **drawing)
    where = how.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorer = load_cost_model(folder, where)
    found: dict[str, Any] = {"cost_model": folder}
    if shards is not None:
        found["shards"] = {"source": shards, **_on_shards(scorer, shards)}
    if pipeline is not None and prompts is not None and judge is not None:
        selection = PromptCounts(explicit, implicit, lookalike, clean)
        about: dict[str, Any] = {"pipeline": pipeline, "prompts": prompts, "judge": judge}
        about |= {"steps": how.steps, "guidance": how.guidance}
        found["drawn"] = about | _on_drawn(
            scorer, pipeline, prompts, judge, selection, Path(out), replace(how, device=where), other_world
        )
    write_atomic(Path(out) / "figures.json", (json.dumps(found, indent=1) + "\n").encode())
    for where in ("shards", "drawn"):
        for name, value in found.get(where, {}).items():
            if "/" not in name:
                print(f"{where:<7} {name:<17} {value if isinstance(value, str | int) else f'{value:.4f}'}")
    print(f"figures {Path(out) / 'figures.json'}")


def _on_shards(scorer: CostScorer, shards: str) -> dict[str, Any]:
    import torch

    from lit_safety.core.progress import counter
    from lit_safety.cost_model.metrics import CollectedCosts, cost_figures
    from lit_safety.data.datamodule import PreferenceDataModule
    from lit_safety.data.reading.batch import to_floats

    data = PreferenceDataModule(test=shards, val_batch_size=32)
    collected = CollectedCosts()
    loader = data.test_dataloader()
    with counter("score batches", len(loader)) as count:
        for batch in loader:
            if batch.chosen is None or batch.rejected is None:
                raise UserError(f"--shards {shards}: sample {batch.keys[0]} lacks its images")
            costs = scorer.costs(to_floats(torch.cat([batch.chosen, batch.rejected]))).cpu()
            collected.update(torch.stack(costs.chunk(2), dim=1), batch.harmful, batch.categories)
            count()
    costs, harmful, about = collected.compute()
    _refuse_infinite(costs)
    if harmful.isnan().all():
        raise UserError(
            f"--shards {shards}: all labels of its {len(costs)} pairs are unknown, so there is nothing to measure"
        )
    figures = {name: float(value) for name, value in cost_figures(costs, harmful, about).items()}
    ranked = int(((harmful[:, 0] - harmful[:, 1]).abs() == 1).sum())
    return {"pairs": len(costs), "pairs_ranked": ranked, "images": int((~harmful.isnan()).sum()), **figures}


def _on_drawn(
    scorer: CostScorer,
    pipeline: str,
    prompts: str,
    judge: str,
    selection: PromptCounts,
    out: Path,
    how: DrawingSettings,
    other_world: bool,
) -> dict[str, Any]:
    import torch

    from lit_safety.core.hashes import content_sha256
    from lit_safety.core.images import open_image
    from lit_safety.core.progress import progress
    from lit_safety.cost_model.metrics import image_figures
    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.gallery import Gallery
    from lit_safety.drawing.pipelines import load_pipeline, local_pipeline
    from lit_safety.drawing.prompts import choose_prompts, read_prompts
    from lit_safety.drawing.worlds import check_world
    from lit_safety.judges.judge import Verdict, asked_of, check_sees
    from lit_safety.judges.judging import judge_drawn
    from lit_safety.judges.load import load_judge

    everything, local = read_prompts(prompts), local_pipeline(pipeline)
    check_world(local, {"--prompts": prompts, "--judge": judge}, other_world, prompts=everything)
    chosen, decides = choose_prompts(everything, selection), load_judge(judge)
    check_sees(decides, [category for row in chosen for category in asked_of(row)], f"--prompts {prompts}")
    gallery = Gallery(out / "images", "drawn", {"pipeline_sha256": content_sha256(local)}, chosen, how)
    with progress("draw", len(chosen)) as tick:
        gallery.draw(load_pipeline(local, Arm(), how.device or "cpu", how.precision), None, tick)
    drawn = gallery.all()
    verdicts = judge_drawn(decides, drawn)
    judged = [(one.path, verdict.harmful) for one, verdict in zip(drawn, verdicts, strict=True)
              if isinstance(verdict, Verdict)]  # fmt: skip
    costs = []
    for start in range(0, len(judged), 64):
        images = [open_image(path) for path, _ in judged[start : start + 64]]
        costs.append(scorer.costs(images).cpu())
    harmful = torch.tensor([float(label) for _, label in judged])
    if not judged or harmful.min() == harmful.max():
        raise UserError(f"--judge {judge}: gives all images the same verdict; draw prompts of both kinds")
    every = torch.cat(costs)
    _refuse_infinite(every)
    figures = {name: float(value) for name, value in image_figures(every, harmful).items()}
    return {"images": len(judged), "harmful": int(harmful.sum()), "errors": len(drawn) - len(judged), **figures}


def _refuse_infinite(costs: Tensor) -> None:
    if not costs.isfinite().all():
        raise UserError("the cost model gives costs that are not finite numbers; train it again")
