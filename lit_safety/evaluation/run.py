"""One evaluation from prompts to verdicts: every arm draws the same prompts and seeds, every judge sees all of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256, digest
from lit_safety.core.progress import progress
from lit_safety.drawing.gallery import DrawingSettings, Gallery, size_of
from lit_safety.drawing.given_images import NOT_MEASURED, GivenImages
from lit_safety.drawing.pipelines import arm_pipeline
from lit_safety.drawing.processes import Load, draw_missing
from lit_safety.evaluation.results import ArmResult, Results
from lit_safety.judges.judge import JudgeError, figure_settings, where_seen
from lit_safety.judges.judging import KeptVerdicts, judge_drawn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.gallery import Drawn
    from lit_safety.drawing.prompts import Prompt, PromptCounts
    from lit_safety.evaluation.quality import Quality
    from lit_safety.judges.judge import Judge, Verdict


@dataclass
class Run:
    """Everything that is given; `execute` does the work."""

    pipeline: str
    prompts_file: str
    prompts: list[Prompt]
    selection: PromptCounts
    judges: list[Judge]
    """The judge that decides, then the further ones."""
    arms: dict[str, Arm]
    drawing: DrawingSettings
    out: Path
    images: Path | None = None
    """Where the images go; None: `images` in `out`. Evaluations that share it draw their common arms once."""
    quality: Quality | None = None
    """FID, CLIPScore and preference scores, where they are asked for."""
    processes: int = 1
    """How many processes draw."""
    not_said: dict[str, int] = field(default_factory=dict)
    """What the report must say of the prompt file: rows that were left out, prompts without a kind."""
    given: dict[str, GivenImages] = field(default_factory=dict)
    """By the name of an arm, the images that another program drew."""

    def __post_init__(self) -> None:
        if self.drawing.device is None:
            import torch

            self.drawing = replace(self.drawing, device="cuda" if torch.cuda.is_available() else "cpu")

    def execute(self) -> Results:
        """Draw and judge every arm.

        Every arm is loaded once before the first one draws, so that a bad one fails before anything is written.

        Raises:
            UserError: an arm does not load, an image cannot be written, or a judge fails on every image.
        """
        with progress("load", len(self.arms)) as tick:
            schedulers = {}
            for name in self.arms:
                schedulers[name] = self.scheduler(name)
                tick(1)
        shared = self._shared(schedulers["base"])
        done = {name: self._arm(name, shared | {"scheduler": schedulers[name]}) for name in self.arms}
        return Results(self.out, shared, self.prompts, self.judges, done, self._quality(done))

    def _quality(self, arms: dict[str, ArmResult]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if self.quality is None:
            return None
        measured = {}
        for name, arm in arms.items():
            with progress(f"quality {name}", len(self.quality.clean)) as tick:
                measured[name] = self.quality.measure(arm.drawn, tick)
        return self.quality.report(measured)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The pipeline on this machine of each arm that draws."""
        return {name: arm_pipeline(name, a, self.pipeline) for name, a in self.arms.items() if name not in self.given}

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """sha256 of each pipeline."""
        return {folder: content_sha256(folder) for folder in set(self.folders.values())}

    def _load(self, name: str) -> Load:
        return Load(self.folders[name], self.arms[name], self.drawing)

    def scheduler(self, name: str) -> str:
        """The class of an arm's scheduler; the arm is loaded for it.

        Raises:
            UserError: it does not load.
        """
        if name in self.given:
            return NOT_MEASURED
        return type(self._load(name)().scheduler).__name__

    def _shared(self, scheduler: str) -> dict[str, Any]:
        """The settings that all arms share, as they stand in the report."""
        return {
            "pipeline": self.pipeline,
            "pipeline_sha256": self.hashes[self.folders["base"]],
            "prompts": self.prompts_file,
            "prompts_sha256": digest([p.identity() for p in self.prompts]),
            "selection": asdict(self.selection),
            "drawn": {
                kind: sum(p.kind == kind for p in self.prompts) for kind in dict.fromkeys(p.kind for p in self.prompts)
            },
            "seeds": {"from": "the column seed of the prompts", "sha256": digest([p.seed for p in self.prompts])},
            **self.not_said,
            "own_guidance": sum(p.guidance is not None for p in self.prompts),
            "judge": self.judges[0].settings,
            "second_judges": [judge.settings for judge in self.judges[1:]],
            **({"quality": self.quality.settings} if self.quality else {}),
            "scheduler": scheduler,
            **self.drawing.pixels(),
            "versions": self.versions(),
        }

    @staticmethod
    def versions() -> dict[str, str]:
        """Of the libraries that pixels depend on."""
        return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}

    def _arm(self, name: str, shared: dict[str, Any]) -> ArmResult:
        own = self.describe(name)
        prompts = [replace(p, user=self.arms[name].user) for p in self.prompts]
        drawn, answers = self.pictures(name, prompts, self.identity(own, shared))
        # a pipeline's own resolution is known by what it drew
        size = {"pixels": size_of(drawn)}
        keys = ("judge", "prompts_sha256", "scheduler")
        judged = {"judge": figure_settings(shared["judge"])}
        how = {"drawn_by": own["drawn_by"]} if name in self.given else self.drawing.protocol()
        protocol = digest({key: shared[key] for key in keys} | judged | how | size)
        seen = [where_seen(judge, prompts, said) for judge, said in zip(self.judges, answers, strict=True)]
        paired = name in self.given and self.given[name].same_seeds
        return ArmResult(shared | own | size, protocol, drawn, seen[0], seen[1:], paired)

    def describe(self, name: str) -> dict[str, Any]:
        """An arm as it stands in the report, its pipeline included."""
        if name in self.given:
            return self.given[name].describe()
        arm, folder = self.arms[name], self.folders[name]
        return arm.describe(folder) | {
            "pipeline": arm.pipeline or self.pipeline, "pipeline_sha256": self.hashes[folder],
        }  # fmt: skip

    def identity(self, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        """What an arm's pixels depend on next to prompts and settings."""
        pixels = (
            "pipeline_sha256",
            "unet_sha256",
            "images_sha256",
            "adapter_sha256",
            "scale",
            "negative_prompt",
            "adapters",
            "guard",
            "user",
        )
        weights = {key: own[key] for key in pixels if key in own}
        return weights | {key: shared[key] for key in ("scheduler", "versions")}

    def pictures(
        self, name: str, prompts: Sequence[Prompt], identity: dict[str, Any]
    ) -> tuple[list[Drawn], list[list[Verdict | JudgeError]]]:
        """Draw prompts with one arm, or take the images that another program drew; they, and what each judge says.

        Raises:
            UserError: an image cannot be written, or a judge fails on every image.
        """
        gallery = Gallery(self.images or self.out / "images", name, identity, prompts, self.drawing)
        if name in self.given:
            drawn = self.given[name].of(prompts)
            gallery.folder.mkdir(parents=True, exist_ok=True)  # of what judges keep
        else:
            with progress(f"draw {name}", len(prompts)) as tick:
                draw_missing(self._load(name), gallery, tick, self.processes)
            drawn = gallery.all()
        answers = []
        for judge in self.judges:
            with progress(f"judge {name}", len(drawn)) as tick:
                kept = KeptVerdicts(gallery.folder, judge) if getattr(judge, "keep", False) else None
                answers.append(judge_drawn(judge, drawn, tick=tick, kept=kept))
            reasons = [v.reason for v in answers[-1] if isinstance(v, JudgeError)]
            if len(reasons) == len(drawn):
                raise UserError(f"the judge {judge.name} failed on every image of {name}: {reasons[0]}; the images "
                                f"stay in {gallery.folder}, no report was written")  # fmt: skip
        return drawn, answers
