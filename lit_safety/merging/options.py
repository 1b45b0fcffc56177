"""What is asked of a merge. Importing this needs no torch: the command line reads its types."""

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

#: comerge's scale by default is this times the square root of the number of experts. Chosen on the toy world's
#: validation prompts for eight of them; the root, because unrelated updates add up in squares.
COMERGE_SCALE = 1.06

#: The methods that look at no model and need no prompts, for messages.
NEED_NOTHING = "sum, mean, svd, ties, dare, tsv_m or iso_c"


@dataclass(frozen=True)
class Recipe:
    """How experts are merged: the options that the command `merge` and the callback `MergeExperts` share.

    Args:
        method: regmean does on each category's inputs what its expert does and on clean inputs nothing; comerge takes
            each output unit from the expert most active in it; mean and sum are exact; svd is the mean truncated to the
            experts' own rank; ties, dare, tsv_m and iso_c are the published methods. regmean and comerge look at the
            base model on prompts, the others at nothing.
        weights: By expert; one that is not named weighs 1. Of all methods but comerge, which takes rows as they are; of
            regmean how much the expert's own inputs count.
        scale: Multiply the merged update by this, whatever the method. comerge leaves each expert a part of its rows,
            mean a part of its update, and sum all that the others add to it: more or less than 1 makes up for that.
            null is 1.06 sqrt(K) for comerge of K >= 2 experts (chosen on validation prompts of the toy world at K = 8;
            unrelated updates add up in squares), and 1 for one expert and every other method. K counts, layer by
            layer, the experts that adapt it.
        rank: Truncate every layer to this rank by SVD; null keeps as much as the method needs.
        density: ties: share of each update's entries that are kept.
        drop: dare: share of each update's entries that are dropped.
        seed: dare: seed of what is dropped.
        statistic: comerge: decide by vote of the calibration prompts or by the mean magnitude over them.
        unit: comerge: take whole rows (output units), which is exact, or single weights, which is cut to the experts'
            summed rank; single weights are compared by their magnitudes and need prompts with `normalise` only.
        normalise: comerge: count every expert's activity in units of its own mean in the layer, so that the expert with
            the largest updates does not win everywhere.
        mu: regmean: how much clean inputs count beside the experts' own: more is nearer to the base, and at some point
            less safe. `--tune true` chooses it on validation prompts.
        epsilon: regmean: ridge of its linear system, in units of the mean eigenvalue.
        null_space: First take out of every expert what acts on clean inputs: keep of its inputs only directions whose
            eigenvalue on clean prompts is below this share of the largest, such as 5e-4; null does not. Needs prompts.
            Not for regmean, which weighs clean inputs, and comerge.
        svc: After the merge make the singular values smaller of directions that several experts share (SVC).
        dtype: Number format of the merged adapter; null is float32, or the expert's own where it is left unchanged.

    Raises:
        UserError: a number that no method can work with.
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
            raise UserError(f"--weights: that of {wrong[0]} is {self.weights[wrong[0]]}; give numbers")
        if self.method == "comerge" and any(weight != 1 for weight in self.weights.values()):
            raise UserError("--weights: comerge takes every row whole from one expert; use --method mean or sum")
        if self.method == "regmean" and (below := sorted(n for n, weight in self.weights.items() if weight < 0)):
            raise UserError(f"--weights: that of {below[0]} is below 0, which regmean cannot count; use --method sum")
        if not 0 <= self.mu < float("inf"):
            raise UserError(f"--mu {self.mu}: must be a number from 0 up")
        if not 0 < self.epsilon < float("inf"):
            raise UserError(f"--epsilon {self.epsilon}: must be above 0, or the linear system has no solution")
        if self.null_space is not None:
            if not 0 < self.null_space < 1:
                raise UserError(f"--null_space {self.null_space}: is a share of the largest eigenvalue, such as 5e-4")
            if self.method in ("regmean", "comerge"):
                raise UserError(f"--null_space: is not for {self.method}; use --method tsv_m, iso_c or sum with it")
        if self.svc and self.method == "comerge" and self.unit == "weight":
            raise UserError("--svc: works on the experts' factors, which single weights leave; use --unit row")

    @property
    def calibrated(self) -> bool:
        """Whether the merge depends on how active the experts are on prompts."""
        return self.method == "comerge" and (self.unit == "row" or self.normalise)

    @property
    def own_inputs(self) -> bool:
        """Whether the merge depends on what each expert's layers are fed with on its own prompts."""
        return self.method == "regmean"

    @property
    def clean_inputs(self) -> bool:
        """Whether it depends on what the base's layers are fed with on clean prompts."""
        return self.own_inputs or self.null_space is not None

    def looks(self, experts: int) -> bool:
        """Whether the base model and prompts are needed to merge so many experts: a single one is left as it is."""
        return self.null_space is not None or (experts > 1 and (self.calibrated or self.own_inputs))

    def scale_of(self, experts: int) -> float:
        """What a layer that so many experts adapt is multiplied by."""
        if self.scale is not None:
            return self.scale
        return COMERGE_SCALE * sqrt(experts) if self.method == "comerge" and experts > 1 else 1.0

    def weight(self, expert: str) -> float:
        """The weight of an expert."""
        return float(self.weights.get(expert, 1.0))


@dataclass(frozen=True)
class CalibrationOptions:
    """What the experts are looked at on.

    Args:
        prompts: Prompt file with kinds and categories, or a folder of shards; for comerge a CSV with a column `prompt`
            is enough, of which only harmful prompts are taken where the category is known. Rows marked held_out are not
            taken by regmean. Do not give the prompts that a report is made of.
        categories: comerge: take prompts of these categories only; null takes all.
        of: regmean: by expert, the category whose prompts are its own, or a prompt file of its own for an expert that
            is of no category (such as somebody's style LoRA); null takes the expert's name.
        count: comerge: how many prompts are taken.
        each: regmean: how many prompts of each expert's category, explicit and implicit ones alike.
        clean: regmean and null_space: how many prompts of what must stay, clean ones and look-alikes alike.
        timesteps: comerge: at how many noise levels, evenly spread, the base model is looked at for each prompt.
        memory: regmean and null_space: GB of memory for Gram matrices; where all do not fit, layers are looked at in
            groups, one after the other. null takes half of what is free.
        steps: Denoising steps of the drawings.
        guidance: Guidance of these drawings; 3 suits the toy world, 7.5 is common for Stable Diffusion.
        batch_size: Prompts at once.
        resolution: Side of the drawings in pixels; null is the pipeline's own.
        seed: Seed of drawings and noise.
        other_world: Take prompts of an embedded world, such as data/toyworld, for a model that is not of this world.

    Raises:
        UserError: a number that cannot be meant.
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
    """How mu is chosen: on validation prompts that were not calibrated on.

    Args:
        mus: The values that are tried, from one calibration.
        prompts: Prompt file with explicit, implicit, look-alike and clean prompts; null takes that of the calibration.
            Rows marked held_out are not taken. Do not give the prompts that a report is made of.
        judge: What decides what is harmful, as for `evaluate`; not a judge that a report is to be made with alone.
        explicit: Explicit prompts drawn for each category.
        implicit: Implicit prompts drawn.
        lookalike: Look-alike prompts drawn.
        clean: Clean prompts drawn.
        steps: Denoising steps; null takes those of the calibration.

    Raises:
        UserError: a number that cannot be meant.
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
            raise UserError(f"--tuning.mus {self.mus}: must be numbers from 0 up")
        if self.clean < 2:
            raise UserError(f"--tuning.clean {self.clean}: the distance to the base needs at least 2 clean prompts")


@dataclass(frozen=True)
class RepairOptions:
    """How a repair is trained, masked and weighed.

    Args:
        rank: Rank of the repair LoRA; the patched one has that of the adapter more.
        steps: Optimizer steps.
        images: Images of the base for each prompt that lost something, from as many seeds.
        batch_size: Images a step.
        lr: Learning rate of AdamW, constant.
        safety_share: Share of each layer's rows that matter most for safety; the repair leaves them alone.
        repair_share: Share of each layer's rows that matter most for what was lost; the repair acts on these only.
        drop: Share of the repair's rows that are dropped at random, the others made larger to make up for it (DARE).
        strengths: Weights of the repair that are tried on the validation prompts.
        harmful: Harmful prompts on which it is measured where safety matters.
        levels: Noise levels a prompt at which that is measured.
        seed: Seed of images, noise and initial weights.

    Raises:
        UserError: a number that cannot be meant.
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
