"""The options of a merge. This file imports no torch, because the command line reads its types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Literal

from lit_safety.core.errors import UserError

Method = Literal["regmean", "comerge", "mean", "sum", "svd", "ties", "dare", "tsv_m", "iso_c"]
Statistic = Literal["vote", "magnitude"]
Unit = Literal["row", "weight"]
Dtype = Literal["float32", "float16", "bfloat16"]

#: comerge's default scale is this times the square root of the number of experts. It was chosen on the toy world's
#: validation prompts for eight experts. The square root is used because the squares of unrelated updates add up.
COMERGE_SCALE = 1.06

#: The methods that need neither the base model nor prompts, for messages.
NEED_NOTHING = "sum, mean, svd, ties, dare, tsv_m or iso_c"


@dataclass(frozen=True)
class Recipe:
    """How experts are merged: the options that the command `merge` and the callback `MergeExperts` share.

    Args:
        method: regmean makes an update that acts like each expert on its category's inputs and does nothing on clean
            inputs; comerge takes each output unit from the expert that is most active in it; mean and sum are exact;
            svd is the mean truncated to the experts' own rank; ties, dare, tsv_m and iso_c are the published methods.
            regmean and comerge run the base model on prompts; the others do not need it.
        weights: By expert; an expert that is not named has weight 1. For all methods except comerge, which takes rows
            unchanged; for regmean the weight of the expert's own inputs.
        scale: Multiply the merged update by this, with any method. comerge keeps only a part of each expert's rows,
            mean only a part of its update, and sum adds the other experts' updates to it; a scale other than 1 can make
            up for this. null is 1.06 sqrt(K) for comerge of K >= 2 experts (chosen on validation prompts of the toy
            world at K = 8; the squares of unrelated updates add up), and 1 for one expert and for every other method. K
            is the number of experts that adapt the layer.
        rank: Truncate every layer to this rank by SVD; null keeps the rank that the method needs.
        density: ties: share of each update's entries that are kept.
        drop: dare: share of each update's entries that are dropped.
        seed: dare: seed for choosing what is dropped.
        statistic: comerge: decide by vote of the calibration prompts or by the mean magnitude over them.
        unit: comerge: take whole rows (output units), which is exact, or single weights, which is truncated to the sum
            of the experts' ranks. Single weights are compared by their magnitudes and need prompts only with
            `normalise`.
        normalise: comerge: measure every expert's activity in units of its own mean in the layer, so that the expert
            with the largest updates does not win everywhere.
        mu: regmean: weight of clean inputs relative to the experts' own. A larger mu gives a model closer to the base,
            and at some point less safe. `--tune true` chooses it on validation prompts.
        epsilon: regmean: ridge of its linear system, in units of the mean eigenvalue.
        null_space: First remove from every expert what acts on clean inputs: keep only input directions whose
            eigenvalue on clean prompts is below this share of the largest, such as 5e-4; null removes nothing. Needs
            prompts. Not for comerge, and not for regmean, which weights clean inputs by itself.
        svc: After the merge lower the singular values of directions that several experts share (SVC).
        dtype: Number format of the merged adapter; null is float32, or the expert's own if the expert is not changed.

    Raises:
        UserError: a number is outside its range.
    """

    method: Method = "regmean"
    weights: Mapping[str, float] = field(default_factory=dict)
    scale: float | None = None
    rank: int | None = None
    density: float = 0.2
    drop: float = 0.5
    seed: int = 0
    statistic: Statistic = "vote"
    unit: Unit = "row"
    normalise: bool = True
    mu: float = 0.3
    epsilon: float = 1e-4
    null_space: float | None = None
    svc: bool = False
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank}: must be at least 1")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise UserError(f"--scale {self.scale}: must be above 0; a negative one would push towards harm")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be above 0 and at most 1")
        if not 0 <= self.drop < 1:
            raise UserError(f"--drop {self.drop}: must be at least 0 and below 1")
        if wrong := sorted(name for name, weight in self.weights.items() if not isfinite(weight)):
            raise UserError(f"--weights: that of {wrong[0]} is {self.weights[wrong[0]]}; give finite numbers")
        if self.method == "comerge" and any(weight != 1 for weight in self.weights.values()):
            raise UserError("--weights: comerge takes every whole row from one expert; use --method mean or sum")
        if self.method == "regmean" and (below := sorted(n for n, weight in self.weights.items() if weight < 0)):
            raise UserError(f"--weights: that of {below[0]} is below 0, which regmean cannot use; use --method sum")
        if not 0 <= self.mu < float("inf"):
            raise UserError(f"--mu {self.mu}: must be a number of at least 0")
        if not 0 < self.epsilon < float("inf"):
            raise UserError(f"--epsilon {self.epsilon}: must be above 0, else the linear system may have no solution")
        if self.null_space is not None:
            if not 0 < self.null_space < 1:
                raise UserError(
                    f"--null_space {self.null_space}: must be a share of the largest eigenvalue, such as 5e-4"
                )
            if self.method in ("regmean", "comerge"):
                raise UserError(f"--null_space: does not work with {self.method}; use --method tsv_m, iso_c or sum")
        if self.svc and self.method == "comerge" and self.unit == "weight":
            raise UserError("--svc: needs the experts' factors, which are lost with --unit weight; use --unit row")

    @property
    def calibrated(self) -> bool:
        """Whether the merge depends on how active the experts are on prompts."""
        return self.method == "comerge" and (self.unit == "row" or self.normalise)

    @property
    def own_inputs(self) -> bool:
        """Whether the merge depends on the inputs of each expert's layers on its own prompts."""
        return self.method == "regmean"

    @property
    def clean_inputs(self) -> bool:
        """Whether the merge depends on the inputs of the base's layers on clean prompts."""
        return self.own_inputs or self.null_space is not None

    def looks(self, experts: int) -> bool:
        """Whether the base model and prompts are needed to merge this many experts: a single one is not changed."""
        return self.null_space is not None or (experts > 1 and (self.calibrated or self.own_inputs))

    def scale_of(self, experts: int) -> float:
        """The factor for a layer that this many experts adapt."""
        if self.scale is not None:
            return self.scale
        return COMERGE_SCALE * sqrt(experts) if self.method == "comerge" and experts > 1 else 1.0

    def weight(self, expert: str) -> float:
        """The weight of an expert."""
        return float(self.weights.get(expert, 1.0))


@dataclass(frozen=True)
class CalibrationOptions:
    """How the base model and the experts are measured.

    Args:
        prompts: Prompt file with kinds and categories, or a folder of shards. For comerge a CSV with a column `prompt`
            is enough; if categories are known, only harmful prompts are used. regmean does not use rows marked
            held_out. Do not give the prompts of a report.
        categories: comerge: use only prompts of these categories; null uses all.
        of: regmean: for each expert the category of its own prompts, or a prompt file for an expert without a category
            (such as a style LoRA); null takes the expert's name as its category.
        count: comerge: number of prompts.
        each: regmean: number of prompts of each expert's category, half explicit and half implicit.
        clean: regmean and null_space: number of prompts of what must stay, half clean and half look-alikes.
        timesteps: comerge: number of evenly spread noise levels at which the base model runs for each prompt.
        memory: regmean and null_space: GB of memory for Gram matrices. If not all fit, layers are measured in groups,
            one after the other. null takes half of the free memory.
        steps: Denoising steps of the drawings.
        guidance: Guidance of these drawings; 3 suits the toy world, 7.5 is common for Stable Diffusion.
        batch_size: Prompts in a batch.
        resolution: Side of the drawings in pixels; null takes the pipeline's own.
        seed: Seed of drawings and noise.
        other_world: Allow prompts of an embedded world, such as data/toyworld, for a model that is not of this world.

    Raises:
        UserError: a number is outside its range.
    """

    prompts: str | None = None
    categories: list[str] | None = None
    of: dict[str, str] | None = None
    count: int = 64
    each: int = 20
    clean: int = 80
    timesteps: int = 4
    memory: float | None = None
    steps: int = 20
    guidance: float = 3.0
    batch_size: int = 8
    resolution: int | None = None
    seed: int = 0
    other_world: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "each", "clean", "timesteps", "steps", "batch_size", "resolution"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise UserError(f"--calibration.{name} {given}: must be at least 1")
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise UserError(f"--calibration.memory {self.memory}: must be above 0 GB")


@dataclass(frozen=True)
class TuningOptions:
    """How mu is chosen, on validation prompts that the calibration did not use.

    Args:
        mus: The values to try, all from one calibration.
        prompts: Prompt file with explicit, implicit, look-alike and clean prompts; null takes that of the calibration.
            Rows marked held_out are not used. Do not give the prompts of a report.
        judge: The judge of harm, as for `evaluate`; it must not be the only judge of a report.
        explicit: Number of explicit prompts for each category.
        implicit: Number of implicit prompts.
        lookalike: Number of look-alike prompts.
        clean: Number of clean prompts.
        steps: Denoising steps; null takes those of the calibration.

    Raises:
        UserError: a number is outside its range.
    """

    mus: list[float] = field(default_factory=lambda: [0.0, 0.03, 0.1, 0.3, 1.0])
    prompts: str | None = None
    judge: str | None = None
    explicit: int = 10
    implicit: int = 40
    lookalike: int = 40
    clean: int = 80
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.mus or any(not 0 <= mu < float("inf") for mu in self.mus):
            raise UserError(f"--tuning.mus {self.mus}: must be numbers of at least 0")
        if self.clean < 2:
            raise UserError(f"--tuning.clean {self.clean}: the distance to the base needs at least 2 clean prompts")


@dataclass(frozen=True)
class RepairOptions:
    """How a repair is trained, masked and weighted.

    Args:
        rank: Rank of the repair LoRA; the rank of the patched one is this plus the adapter's rank.
        steps: Optimizer steps.
        images: Number of images of the base, from different seeds, for each prompt that lost something.
        batch_size: Images in a step.
        lr: Learning rate of AdamW, constant.
        safety_share: Share of each layer's rows that matter most for safety; the repair does not change them.
        repair_share: Share of each layer's rows that matter most for what was lost; the repair changes only these.
        drop: Share of the repair's rows that are dropped at random; the others are scaled up to compensate (DARE).
        strengths: Weights of the repair to try on the validation prompts.
        harmful: Number of harmful prompts for measuring which rows matter for safety.
        levels: Number of noise levels for each prompt in this measurement.
        seed: Seed of images, noise and initial weights.

    Raises:
        UserError: a number is outside its range.
    """

    rank: int = 8
    steps: int = 300
    images: int = 4
    batch_size: int = 8
    lr: float = 1e-3
    safety_share: float = 0.25
    repair_share: float = 0.75
    drop: float = 0.0
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5])
    harmful: int = 40
    levels: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "images", "batch_size", "harmful", "levels"):
            if getattr(self, name) < 1:
                raise UserError(f"--repair.{name} {getattr(self, name)}: must be at least 1")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"--repair.lr {self.lr}: must be above 0")
        if not 0 <= self.safety_share < 1:
            raise UserError(f"--repair.safety_share {self.safety_share}: must be at least 0 and below 1")
        if not 0 < self.repair_share <= 1:
            raise UserError(f"--repair.repair_share {self.repair_share}: must be above 0 and at most 1")
        if not 0 <= self.drop < 1:
            raise UserError(f"--repair.drop {self.drop}: must be at least 0 and below 1")
        if not self.strengths or any(not 0 < one < float("inf") for one in self.strengths):
            raise UserError(f"--repair.strengths {self.strengths}: must be numbers above 0")
