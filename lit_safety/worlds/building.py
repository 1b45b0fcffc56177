"""What the builds of both worlds share: folders and stages, the form of pairs, and the fit of the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lit_safety.core.errors import UserError
from lit_safety.core.processes import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL import Image

MOST_SCENES = 1_000_000
"""Most images of the base's data: 3 GB on disk at 32 px, 7 GB at 48 px."""
Stage = TypeVar("Stage", bound=str)


def prepare(out: Path, work: Path, scenes: int, processes: int) -> None:
    """Makes the folders of a build.

    Raises:
        UserError: a number is outside its range, or a folder cannot be made.
    """
    check_count(processes, "--processes")
    if not 1000 <= scenes <= MOST_SCENES:
        raise UserError(f"scenes is {scenes}; it must be at least 1000 and at most {MOST_SCENES}")
    for folder in (out, work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}; name a folder you may write to") from error


def do_stages(
    stages: Sequence[Stage],
    wanted: Sequence[Stage],
    there: Callable[[Stage], Path | None],
    output: Callable[[Stage], Path],
    run: Callable[[Stage], None],
) -> None:
    """Runs the wanted stages that are not done yet, in the order of ``stages``.

    Args:
        stages: all stages, in order.
        wanted: the stages to run, in any order.
        there: gives a stage's output from an earlier build; None: the stage must run.
        output: gives the path that a stage writes.
        run: runs a stage.
    """
    for stage in stages:
        if stage not in wanted:
            continue
        if (found := there(stage)) is not None:
            print(f"{stage}: {found} is there", flush=True)
            continue
        print(f"{stage}: making {output(stage)}", flush=True)
        run(stage)


# Preference pairs.

SAFE_COST, LOOKALIKE_COST = -1.0, -0.5
"""Ground-truth cost of a safe image, and of one with a look-alike, which is closer to 0."""
KINDS = ("harmful", "clean_harm", "harmful", "clean_quality", "harmful", "clean_harm")
"""The kinds of pairs, in turn.

Half have harmful prompts, a third clean prompts with a harmful rejected image, a sixth clean prompts with two safe
images.
"""


@dataclass(frozen=True)
class Pair:
    """The arguments of `ShardWriter.write`."""

    key: str
    metadata: dict[str, Any]
    chosen: Image.Image
    rejected: Image.Image


# The cost model that a world ships. It is fitted on tens of thousands of the world's own pairs.

WIDTH, STEPS, BATCH, RATE = 384, 6000, 128, 3e-3


def fit_cost_model(clip: Path, train: Path, val: Path, target: Path, work: Path) -> None:
    """Fits as `configs/cost_model.yaml` does, but on more pairs and for longer; exports into `target`."""
    from lightning.pytorch import Trainer, seed_everything
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import OneCycleLR

    from lit_safety.callbacks.export import ExportCostModel
    from lit_safety.cost_model.degrade import Degradation
    from lit_safety.data.datamodule import PreferenceDataModule
    from lit_safety.modules.cost_model import CostModel

    seed_everything(0, verbose=False)
    model = CostModel(
        str(clip),
        width=WIDTH,
        degradation=Degradation(views=1),  # with so many pairs, one degraded view of each image is enough
        feature_cache=str(work / "features"),
        optimizer=lambda parameters: AdamW(parameters, lr=RATE, weight_decay=0.05),
        lr_scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS, pct_start=0.1),
    )
    data = PreferenceDataModule(train=str(train), val=str(val), batch_size=BATCH)
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, val_check_interval=STEPS // 4, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=str(work), accelerator="cpu",
        callbacks=[ExportCostModel(str(target))],
    )  # fmt: skip
    trainer.fit(model, data)
