"""One evaluation from prompts to verdicts, and what it found, before it is written down in any form.

Every arm draws the same prompts and seeds, and every judge sees all images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256, digest
from lit_safety.core.intervals import DEFINITIONS
from lit_safety.core.progress import progress
from lit_safety.drawing.gallery import DrawingSettings, Gallery, Load, draw_missing, size_of
from lit_safety.drawing.given_images import NOT_MEASURED, GivenImages
from lit_safety.drawing.pipelines import Pipelines, arm_pipeline
from lit_safety.evaluation.metrics import (
    Answers,
    answers,
    any_of,
    ask_any,
    ask_pairs,
    ask_questions,
    differences,
    disagreement,
    same_prompt,
    say_absent,
    summarise,
)
from lit_safety.evaluation.quality import Measured, Measuring, Quality
from lit_safety.judges.answering import Answering
from lit_safety.judges.judge import (
    JudgeError,
    NotJudged,
    Verdict,
    asked_of,
    figure_settings,
    in_order,
    unseen,
    where_seen,
    without_precision,
)
from lit_safety.judges.judging import Judging, KeptVerdicts, look

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.gallery import Drawn
    from lit_safety.drawing.prompts import Prompt, PromptCounts
    from lit_safety.evaluation.audit import Audit
    from lit_safety.judges.answering import Answerer, Said
    from lit_safety.judges.judge import Judge, Verdict


@dataclass(frozen=True)
class ArmResult:
    """One arm's images and what the judges say of them, in the order of the prompts."""

    settings: dict[str, Any]
    """How it drew: the shared settings and the arm's own."""
    protocol: str
    """Hash of everything that must be equal if two arms are compared: prompts, seeds, judge, steps, guidance, ..."""
    drawn: list[Drawn]
    verdicts: list[Verdict | JudgeError]
    second: list[list[Verdict | JudgeError]] = field(default_factory=list)
    """The answers of the further judges."""
    paired: bool = False
    """Another program drew the images, of the same prompts from the same seeds: figures are paired with the base's,
    though the protocol, which says how they were drawn, is another."""
    told: list[list[Said]] | None = None
    """The answers to the questions about each image; None: nobody was asked."""


@dataclass(frozen=True)
class Results:
    """Everything the report is written from."""

    out: Path
    settings: dict[str, Any]
    prompts: list[Prompt]
    judges: list[Judge]
    """The judge that decides, then the further ones."""
    arms: dict[str, ArmResult]
    quality: tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]] | None = None
    """Of `Quality.report`: figures by arm, differences to the base by arm; None: not measured."""
    audit: Audit | None = None
    """By which rates are corrected."""

    def answers(self, verdicts: Sequence[Verdict | JudgeError], judge: Judge) -> list[Answers]:
        """The questions of all prompts, answered by one judge's verdicts."""
        labels = set(judge.settings.get("labels", ()))
        seen = judge.settings.get("categories")
        counting = "counts" in judge.settings
        rows = [answers(p, v, labels, seen, counting) for p, v in zip(self.prompts, verdicts, strict=True)]
        ask_pairs(self.prompts, rows)
        ask_any(self.prompts, rows)
        return rows

    @cached_property
    def groups(self) -> list[int] | None:
        """The same number for images of one prompt, where prompts are drawn from several seeds; else None."""
        asked = [prompt for prompt in self.prompts if prompt.harmful] or self.prompts
        counts = set(Counter(map(same_prompt, asked)).values())
        if len(counts) != 1 or counts == {1}:
            return None
        numbers: dict[Any, int] = {}
        return [numbers.setdefault(same_prompt(prompt), len(numbers)) for prompt in self.prompts]

    def rows(self, arm: str) -> list[Answers]:
        """One arm's answers by the judge that decides."""
        rows = self.answers(self.arms[arm].verdicts, self.judges[0])
        if self.arms[arm].told is not None:
            ask_questions(self.prompts, rows, self.arms[arm].told or [])
        return rows

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: settings, arms with figures and intervals, differences to the base."""
        rows = {name: self.rows(name) for name in self.arms}
        arms = {name: self._arm(arm, rows[name]) | self._quality(name) for name, arm in self.arms.items()}
        of_base = self.arms["base"].protocol
        same = [name for name, arm in self.arms.items() if arm.protocol == of_base or arm.paired]
        changes = {name: differences(rows["base"], rows[name]) for name in same if name != "base"}
        if self.quality is not None:
            for name, changed in changes.items():
                changed["quality"] = self.quality[1][name]
        top: dict[str, Any] = {name: arms[name] for name in ("base", "aligned") if name in arms}
        return {
            "format": 1,
            "settings": self.settings,
            **top,
            "arms": arms,
            "differences": changes,
            "definitions": DEFINITIONS,
        }

    def _quality(self, name: str) -> dict[str, Any]:
        """FID and CLIPScore of one arm, each with a hash of everything that must be equal if two values are
        compared."""
        if self.quality is None:
            return {}
        found = {}
        for figure, entry in self.quality[0][name].items():
            how = without_precision(self.settings["quality"]["fid" if figure.startswith("fid_") else figure])
            other = None
            if figure == "fid_base":  # it compares with the base, whatever else there is to compare with
                how = {key: value for key, value in how.items() if key != "reference"}
                other = self.arms["base"].settings["pipeline_sha256"]
            found[figure] = entry | {"protocol": digest([self.arms[name].protocol, how, other])}
        return {"quality": found}

    def _arm(self, arm: ArmResult, rows: Sequence[Answers]) -> dict[str, Any]:
        failed = [
            {"file": d.path.name, "prompt": p.prompt, "seed": p.seed, "reason": v.reason}
            for d, p, v in zip(arm.drawn, self.prompts, arm.verdicts, strict=True)
            if isinstance(v, JudgeError) and not isinstance(v, NotJudged)
        ]
        unseen_by = self.judges[0].settings
        blind = Counter(category for p in self.prompts for category in unseen(unseen_by, asked_of(p)))
        found = {
            "n": len(self.prompts),
            "errors": len(failed),
            **say_absent(summarise(rows, self.groups)),
            "error_list": failed,
            # images of prompts for a category that the judge does not see
            "not_judged": {category: blind[category] for category in in_order(blind)},
            "protocol": arm.protocol,
            "settings": arm.settings,
        }
        for judge, verdicts in zip(self.judges[1:], arm.second, strict=True):
            found.setdefault("second_judges", {})[judge.name] = {
                **say_absent(summarise(self.answers(verdicts, judge), self.groups)),
                "disagreement": disagreement(arm.verdicts, verdicts),
            }
        if self.audit is not None:
            found["corrected"] = self.audit.correct(found)
        return found


@dataclass(frozen=True)
class Seen:
    """One arm's images and what everybody says who looked at them, in the order of the prompts."""

    drawn: list[Drawn]
    answers: list[list[Verdict | JudgeError]]
    """Of each judge."""
    told: list[list[Said]] | None
    """The answers to the questions about each image; None: nobody was asked."""
    measured: Measured | None
    """For FID, CLIPScore and preference scores; None: nothing is measured."""


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
    named: dict[str, Any] | None = None
    """The protocol that is followed, as `protocols.Applied.describe` tells it."""
    answerer: Answerer | None = None
    """Who answers the questions that the prompt file asks about images."""
    audit: Audit | None = None
    """How right the judge that decides is, by which its rates are corrected."""
    pipelines: Pipelines = field(default_factory=Pipelines)
    """Keeps what is loaded for the next arm."""

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
        done, measured = {}, {}
        for name in self.arms:
            done[name], measured[name] = self._arm(name, shared | {"scheduler": schedulers[name]})
        self.pipelines.release()
        quality = None
        if self.quality is not None:
            quality = self.quality.report({name: one for name, one in measured.items() if one is not None})
        return Results(self.out, shared, self.prompts, self.judges, done, quality, self.audit)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The pipeline on this machine of each arm that draws."""
        return {name: arm_pipeline(name, a, self.pipeline) for name, a in self.arms.items() if name not in self.given}

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """sha256 of each pipeline."""
        return {folder: content_sha256(folder) for folder in set(self.folders.values())}

    def _load(self, name: str) -> Load:
        return Load(self.folders[name], self.arms[name], self.drawing, self.pipelines)

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
            **({"protocol": self.named} if self.named else {}),
            **({"any_of": count} if (count := any_of(self.prompts)) > 1 else {}),
            "own_guidance": sum(p.guidance is not None for p in self.prompts),
            "judge": self.judges[0].settings,
            "second_judges": [judge.settings for judge in self.judges[1:]],
            **({"questions": self.answerer.settings} if self.answerer else {}),
            **({"audit": self.audit.describe()} if self.audit else {}),
            **({"quality": self.quality.settings} if self.quality else {}),
            "scheduler": scheduler,
            **self.drawing.pixels(),
            "versions": self.versions(),
        }

    @staticmethod
    def versions() -> dict[str, str]:
        """Of the libraries that pixels depend on."""
        return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}

    def _arm(self, name: str, shared: dict[str, Any]) -> tuple[ArmResult, Measured | None]:
        own = self.describe(name)
        prompts = [replace(p, user=self.arms[name].user) for p in self.prompts]
        seen = self.draw_and_judge(name, prompts, self.identity(own, shared))
        # a pipeline's own resolution is known by what it drew
        size = {"pixels": size_of(seen.drawn)}
        keys = ("judge", "prompts_sha256", "scheduler")
        judged = {"judge": figure_settings(shared["judge"])}
        how = {"drawn_by": own["drawn_by"]} if name in self.given else self.drawing.protocol()
        named = {}
        if self.named:  # two reports that name other protocols, or deviate otherwise, are not compared
            named = {"named": {key: self.named[key] for key in ("name", "sha256", "deviations")}}
        protocol = digest({key: shared[key] for key in keys} | judged | how | size | named)
        answers = [where_seen(judge, prompts, said) for judge, said in zip(self.judges, seen.answers, strict=True)]
        paired = name in self.given and self.given[name].same_seeds
        result = ArmResult(shared | own | size, protocol, seen.drawn, answers[0], answers[1:], paired, seen.told)
        return result, seen.measured

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

    def draw_and_judge(self, name: str, prompts: Sequence[Prompt], identity: dict[str, Any]) -> Seen:
        """Draw prompts with one arm, or use another program's images, and show them to all who look at them.

        Each image is read once, and judged, measured and asked about at the same time.

        Raises:
            UserError: an image cannot be written, a judge fails on every image, or quality cannot be measured.
        """
        gallery = Gallery(self.images or self.out / "images", name, identity, prompts, self.drawing)
        if name in self.given:
            drawn = self.given[name].of(prompts)
            gallery.folder.mkdir(parents=True, exist_ok=True)  # of what judges keep
        else:
            with progress(f"draw {name}", len(prompts)) as tick:
                draw_missing(self._load(name), gallery, tick, self.processes)
            drawn = gallery.all()
        judging = [
            Judging(judge, drawn, KeptVerdicts(gallery.folder, judge) if getattr(judge, "keep", False) else None)
            for judge in self.judges
        ]
        measuring = None if self.quality is None else Measuring(self.quality, drawn)
        answering = None
        if self.answerer is not None:
            answering = Answering(self.answerer, drawn, [prompt.questions for prompt in prompts], gallery.folder)
        viewers = [one for one in (*judging, measuring, answering) if one is not None]
        with progress(f"judge {name}", len(drawn)) as tick:
            look(drawn, viewers, tick=tick)
        for one in judging:
            reasons = [answer.reason for answer in one.answers if isinstance(answer, JudgeError)]
            if len(reasons) == len(drawn):
                raise UserError(f"the judge {one.judge.name} failed on every image of {name}: {reasons[0]}; the images "
                                f"stay in {gallery.folder}, but a report was not written")  # fmt: skip
        return Seen(
            drawn,
            [one.answers for one in judging],
            None if answering is None else answering.answers,
            None if measuring is None else measuring.result(),
        )
