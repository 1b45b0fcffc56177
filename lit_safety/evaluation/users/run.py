"""One evaluation for users, from rows to verdicts: each row is drawn by every arm from one seed, and judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.core.progress import progress
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.prompts import PromptCounts
from lit_safety.evaluation.run import ArmResult, Run
from lit_safety.evaluation.users.rows import PARTS
from lit_safety.evaluation.users.vlm import AnswerBook, ask_passes, ask_wins
from lit_safety.judges.judge import JudgeError, figure_settings

if TYPE_CHECKING:
    from pathlib import Path

    from lit_safety.drawing.gallery import DrawingSettings
    from lit_safety.drawing.given_images import GivenImages
    from lit_safety.drawing.prompts import Place, Prompt
    from lit_safety.evaluation.users.answers import Outcome
    from lit_safety.evaluation.users.rows import Counts, UserRow
    from lit_safety.evaluation.users.vlm import UserVLM
    from lit_safety.judges.judge import Judge
    from lit_safety.users.table import Users


OURS = "psa"
"""The arm of --adapter, which draws each row for its own user."""
NULL = "null"
"""The same adapter, drawing for the null user."""
BASE = "base"


@dataclass(frozen=True)
class Asked:
    """What a vision-language model answered."""

    passes: dict[str, list[bool | JudgeError]]
    """By arm, a row each."""
    wins: dict[str, list[Outcome | JudgeError | None]]
    """By the arm that ours is compared with; None for rows that are not compared."""


@dataclass(frozen=True)
class UserResults:
    """Everything that a report for users is written from."""

    out: Path
    settings: dict[str, Any]
    rows: list[UserRow]
    judges: list[Judge]
    """The judge that decides, then the further ones."""
    arms: dict[str, ArmResult]
    """Images and verdicts in the order of the rows."""
    seed: int
    vlm: UserVLM | None = None
    asked: Asked | None = None

    @property
    def rivals(self) -> list[str]:
        """The arms that ours is compared with."""
        return [name for name in self.arms if name != OURS]


@dataclass
class UserRun:
    """Everything that is given; `execute` does the work."""

    pipeline: str
    prompts_file: str
    rows: list[UserRow]
    counts: Counts | None
    """Prompts for each user; None: the prompt file says who is asked what."""
    users: Users
    table_sha256: str
    """Of the users' profiles."""
    judges: list[Judge]
    adapter: str
    arms: dict[str, Arm]
    """Further arms."""
    drawing: DrawingSettings
    out: Path
    images: Path | None = None
    seed: int = 0
    """Of the order in which two images are shown."""
    vlm: UserVLM | None = None
    processes: int = 1
    not_said: dict[str, int] = field(default_factory=dict)
    """What the report must say of the prompt file: rows that were left out, and why."""
    given: dict[str, GivenImages] = field(default_factory=dict)
    """By the name of an arm, the images that another program drew."""
    negative_prompt: str | None = None
    """Of the base."""
    adapter_negative_prompt: str | None = None
    """Of --adapter's two arms."""
    named: dict[str, Any] | None = None
    """The protocol that is followed, as `protocols.Applied.describe` tells it."""
    _run: Run = field(init=False)

    def __post_init__(self) -> None:
        taken = {BASE, OURS, NULL} & self.arms.keys()
        if taken:
            raise UserError(
                f"--arms.{min(taken)}: this name is taken: `base` is the pipeline, `psa` is --adapter drawing for each "
                "user, `null` the same for the null user"
            )
        ours = Arm(adapter=self.adapter, users=str(self.users.file), negative_prompt=self.adapter_negative_prompt)
        if ours.user_adapter() is None:
            raise UserError(
                f"--adapter {self.adapter}: is not a user adapter; a LoRA is a further arm, --arms.NAME.adapter"
            )
        self.arms = {BASE: Arm(negative_prompt=self.negative_prompt), OURS: ours, NULL: ours, **self.arms}
        for name, arm in self.arms.items():
            if arm.user_adapter() is not None and arm.users is None:
                self.arms[name] = replace(arm, users=str(self.users.file))
            self.arms[name].check(name)
        unique = list(dict.fromkeys(row.prompt for row in self.rows))
        self._run = Run(
            self.pipeline, self.prompts_file, unique, PromptCounts(), self.judges, self.arms, self.drawing, self.out,
            self.images, None, self.processes, given=self.given,
        )  # fmt: skip

    def execute(self) -> UserResults:
        """Draw and judge every arm, then ask the vision-language model where there is one.

        Raises:
            UserError: an arm does not load, a user has no embedding, an image cannot be written, or a judge fails on
                every image.
        """
        self._check_judges()
        ids = list(dict.fromkeys(row.profile.user_id for row in self.rows))
        embeddings = digest(self.users.embeddings(ids).tolist())
        with progress("load", len(self.arms)) as tick:
            schedulers = {}
            for name in self.arms:
                schedulers[name] = self._run.scheduler(name)
                tick(1)
        shared = self._shared(schedulers[BASE], embeddings)
        arms = {}
        for name in self.arms:
            arms[name] = self._arm(name, shared | {"scheduler": schedulers[name]}, embeddings)
        self._run.pipelines.release()
        asked = self._ask(arms) if self.vlm is not None else None
        return UserResults(self.out, shared, self.rows, self.judges, arms, self.seed, self.vlm, asked)

    def draws_for_each(self, name: str) -> bool:
        """Whether an arm draws every row for its own user."""
        arm = self.arms[name]
        return name != NULL and arm.user_adapter() is not None and arm.user is None

    def _check_judges(self) -> None:
        banned = dict.fromkeys(category for row in self.rows for category in row.profile.banned)
        for judge in self.judges:
            unknown = [category for category in banned if category not in judge.settings.get("labels", ())]
            if unknown:
                raise UserError(
                    f"the judge {judge.name} cannot recognise {unknown[0]}, which a user bans: the Pass Rate needs one "
                    f"that tells categories apart ({', '.join(CATEGORIES)})"
                )

    def _shared(self, scheduler: str, embeddings: str) -> dict[str, Any]:
        users = dict.fromkeys(row.profile for row in self.rows)
        splits = dict.fromkeys(user.split for user in users)
        shared = {
            "pipeline": self.pipeline,
            "pipeline_sha256": self._run.hashes[self._run.folders[BASE]],
            "prompts": self.prompts_file,
            "users": str(self.users.file),
            "users_sha256": embeddings,
            "profiles_sha256": self.table_sha256,
            "tested": {split or "users": sum(user.split == split for user in users) for split in splits},
            "counts": "as the prompt file asks" if self.counts is None else asdict(self.counts),
            **self.not_said,
            "rows": {part: sum(row.part == part for row in self.rows) for part in PARTS},
            "different_prompts": len(self._run.prompts),
            "rows_sha256": digest([[row.profile.user_id, row.part, row.prompt.identity()] for row in self.rows]),
            "order_seed": self.seed,
            "judge": self.judges[0].settings,
            "second_judges": [judge.settings for judge in self.judges[1:]],
            "scheduler": scheduler,
            **self._run.drawing.pixels(),
            "versions": self._run.versions(),
        }
        judged = {"judge": figure_settings(self.judges[0].settings)}
        same = {key: shared[key] for key in ("rows_sha256", "scheduler", "order_seed")}
        named = {}
        if self.named:
            shared["named_protocol"] = self.named
            named = {"named": {key: self.named[key] for key in ("name", "sha256", "deviations")}}
        protocol = digest(same | judged | self._run.drawing.protocol() | named)
        return shared | {"protocol": protocol}

    def _arm(self, name: str, shared: dict[str, Any], embeddings: str) -> ArmResult:
        own = self._run.describe(name)
        identity = self._run.identity(own, shared)
        each = self.draws_for_each(name)
        if each:
            own["user"] = {"id": "each prompt's own", "sha256": embeddings}
            identity["user"] = embeddings
        wanted = [replace(row.prompt, user=row.profile.user_id if each else self.arms[name].user) for row in self.rows]
        # One that several users share, and no user changes, is drawn once; of what is given each row has its own.
        keys = [prompt.place if name in self.given else prompt for prompt in wanted]
        unique: dict[Place | Prompt | None, Prompt] = {}
        for key, prompt in zip(keys, wanted, strict=True):
            unique.setdefault(key, prompt)
        seen = self._run.draw_and_judge(name, list(unique.values()), identity)
        number_of = {key: number for number, key in enumerate(unique)}
        numbers = [number_of[key] for key in keys]
        answers = [[given[number] for number in numbers] for given in seen.answers]
        own["pictures"] = len(unique)
        return ArmResult(shared | own, shared["protocol"], [seen.drawn[i] for i in numbers], answers[0], answers[1:])

    def _ask(self, arms: dict[str, ArmResult]) -> Asked:
        judge = self.vlm
        assert judge is not None
        book = AnswerBook(self.out / "user_judge_answers.jsonl")
        passes: dict[str, list[bool | JudgeError]] = {}
        wins: dict[str, list[Outcome | JudgeError | None]] = {}
        for name, arm in arms.items():
            with progress(f"{judge.name}: pass {name}", len(self.rows)) as tick:
                passes[name] = ask_passes(judge, book, self.rows, arm.drawn, tick)
            failed = [answer.reason for answer in passes[name] if isinstance(answer, JudgeError)]
            if len(failed) == len(self.rows):
                raise UserError(f"the judge {judge.name} failed on every image of {name}: {failed[0]}; the images "
                                f"and all answers so far stay, but a report was not written")  # fmt: skip
        for name, arm in arms.items():
            if name != OURS:
                with progress(f"{judge.name}: {OURS} or {name}", len(self.rows)) as tick:
                    wins[name] = ask_wins(judge, book, self.rows, arms[OURS].drawn, arm.drawn, self.seed, tick)
        return Asked(passes, wins)
