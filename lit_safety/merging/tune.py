"""Choosing mu on validation prompts: every candidate draws them, a judge decides, and a curve is plotted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.prompts import PromptSet, read_prompts
from lit_safety.drawing.worlds import refuse_reports_own
from lit_safety.evaluation.command import evaluate
from lit_safety.judges.load import load_judge
from lit_safety.merging.options import CalibrationOptions, TuningOptions
from lit_safety.report.charts import Axis, Chart, Point, Series, png, share_range

SAFETY = ("ip", "ip_implicit")
"""Figures for which lower is better: shares of images with harm, for explicit and for implicit prompts."""
KEPT = ("benign_recall", "benign_recall_lookalike")
"""Figures for which higher is better: shares of clean and look-alike prompts that show what was asked for."""


@dataclass(frozen=True)
class Tried:
    """The results of one mu on the validation prompts: shares of images, None if no such prompt was drawn."""

    mu: float
    ip: float | None
    ip_implicit: float | None
    benign_recall: float | None
    benign_recall_lookalike: float | None
    fid: float | None
    """FID of clean prompts' images to the base's; None: the judge gives no features."""
    images: int

    @property
    def harm(self) -> float:
        """The mean of both shares of harmful images."""
        return _mean([self.ip, self.ip_implicit])

    @property
    def wrong(self) -> float:
        """The sum of the wrong shares.

        These are harm in images of explicit and of implicit prompts, and clean and look-alike prompts whose images lost
        what was asked for.
        """
        lost = [1 - share for share in (self.benign_recall, self.benign_recall_lookalike) if share is not None]
        return sum(share for share in (self.ip, self.ip_implicit) if share is not None) + sum(lost)


def choose(tried: Collection[Tried]) -> Tried:
    """The mu with the fewest wrong images (`Tried.wrong`); of equal ones the nearest to the base, then the largest."""
    return min(tried, key=lambda one: (round(one.wrong, 9), one.fid if one.fid is not None else 0.0, -one.mu))


def check_tuning(options: TuningOptions, prompts: str | None) -> tuple[str, PromptSet]:
    """The file of validation prompts and its content; called before anything is computed.

    Args:
        options: the tuning's options.
        prompts: the calibration's prompts.

    Raises:
        UserError: the judge or the prompts are missing or are those of a report, or a kind of prompts is missing.
    """
    if options.judge is None:
        raise UserError(
            "--tune: give --tuning.judge, which decides which images are harmful, such as data/toyworld/judge"
        )
    source = options.prompts or prompts
    if source is None:
        raise UserError("--tune: give --tuning.prompts, a file with explicit, implicit, look-alike and clean prompts")
    refuse_reports_own([source, options.judge], "--tune:")
    rows = PromptSet([row for row in read_prompts(source) if not row.held_out])
    if not any(row.harmful for row in rows) or not any(not row.harmful for row in rows):
        raise UserError(f"--tuning.prompts {source}: must hold harmful and clean prompts, not marked held_out")
    return source, rows


def tune(
    pipeline: str,
    candidates: Mapping[float, Path],
    categories: Collection[str],
    options: TuningOptions,
    calibration: CalibrationOptions,
    used: Collection[str],
    out: Path,
    device: str | None = None,
) -> tuple[Tried, list[Tried]]:
    """Draw the validation prompts with every candidate and the base, judge them, and choose.

    Args:
        pipeline: the base.
        candidates: the folder of the merged adapter by mu.
        categories: the experts' categories: only their harmful prompts are drawn.
        options: which prompts, how many, and which judge.
        calibration: how images are drawn if `options` does not say it.
        used: prompts of the calibration; they are left out.
        out: folder for the report of these drawings.
        device: the device to draw on.

    Returns:
        The chosen candidate, and all candidates in the order of mu.

    Raises:
        UserError: as `check_tuning` and `evaluate`.
    """
    source, rows = check_tuning(options, calibration.prompts)
    about = {*categories}
    fresh = [row for row in rows if row.prompt not in used and (not row.harmful or about & {row.category, *row.also})]
    if not any(row.harmful for row in fresh) or not any(not row.harmful for row in fresh):
        raise UserError(
            f"--tuning.prompts {source}: the calibration used all of its prompts; give others, or calibrate on fewer"
        )
    arms = {_name(mu): Arm(adapter=str(folder)) for mu, folder in sorted(candidates.items())}
    judge = options.judge or ""
    with redirect_stdout(StringIO()):  # its paths would be wrong: the folder is moved afterwards
        metrics = evaluate(
            pipeline=pipeline,
            prompts=[
                {
                    key: list(value) if isinstance(value, tuple) else value
                    for key, value in row.identity().items()
                    if key in CELLS
                }
                for row in fresh
            ],
            judge=judge,
            out=str(out),
            arms=arms,
            fid="judge" if getattr(load_judge(judge), "features", None) is not None else None,
            explicit=options.explicit,
            implicit=options.implicit,
            lookalike=options.lookalike,
            clean=options.clean,
            adversarial=0,
            other_world=calibration.other_world,
            steps=options.steps or calibration.steps,
            guidance=calibration.guidance,
            device=device,
        )
    tried = [tried_of(mu, metrics["arms"][_name(mu)]) for mu in sorted(candidates)]
    return choose(tried), tried


CELLS = ("prompt", "kind", "category", "concept", "benign", "held_out", "seed", "guidance")


def _name(mu: float) -> str:
    return f"mu {mu:g}"


def tried_of(mu: float, arm: Mapping[str, Any]) -> Tried:
    """The shares of an arm in metrics.json. An image that the judge could not judge does not count."""
    counts = arm["counts"]

    def share(figure: str) -> float | None:
        found = counts.get(figure)
        parts = [] if found is None else [found] if "hits" in found else list(found.values())
        n = sum(part["n"] for part in parts)
        return sum(part["hits"] for part in parts) / n if n else None

    fid = arm.get("quality", {}).get("fid_base", {}).get("value")
    shares = {figure: share(figure) for figure in (*SAFETY, *KEPT)}
    return Tried(mu, **shares, fid=fid, images=arm["n"] - arm["errors"])


def told(chosen: Tried, tried: Collection[Tried], options: TuningOptions, prompts: str) -> dict[str, Any]:
    """What `report.json` says about the choice."""
    about = {key: value for key, value in asdict(options).items() if key not in ("mus", "prompts")}
    rule = "smallest sum of shares that are wrong (ip, ip_implicit, 1 - recalls); then nearest to the base"
    return {"mu": chosen.mu, "rule": rule, "prompts": prompts, **about, "tried": [asdict(one) for one in tried]}


def curve(tried: Collection[Tried], chosen: Tried) -> bytes:
    """Safety against fidelity as a PNG file: one point for each mu, with the chosen one marked."""
    measured = [one for one in tried if one.fid is not None]
    rows = measured or list(tried)
    label = (
        "FID of clean prompts to the base"
        if measured
        else "clean and look-alike prompts that lost what was asked for, mean"
    )
    low, high, marks = share_range([0.0, *(one.harm for one in rows)])

    def point_of(one: Tried) -> Point:
        lost = 1 - _mean([one.benign_recall, one.benign_recall_lookalike])
        return Point(lost if one.fid is None else one.fid, one.harm)

    along = Series("mu", [point_of(one) for one in rows], colour=0, line=True)
    names = {one.mu: f"{one.mu:g}, chosen" if one == chosen else f"{one.mu:g}" for one in rows}
    points = [Series(f"mu {names[one.mu]}", [point_of(one)], n, mark=names[one.mu]) for n, one in enumerate(rows, 1)]
    title = "Safety against fidelity, on validation prompts"
    chart = Chart(
        title, Axis(label), Axis("images with harm, explicit and implicit", (low, high), marks), [along, *points]
    )
    return png([chart], (6.4, 4.4))


def _mean(shares: Collection[float | None]) -> float:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else 0.0


def table(tried: Collection[Tried], chosen: Tried) -> str:
    """A table of all candidates for the terminal; shares in percent."""

    def cell(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}"

    rows: list[tuple[str, ...]] = [("mu", "IP", "implicit", "clean", "look-alikes", "FID to the base", "")]
    for one in tried:
        shares = (one.ip, one.ip_implicit, one.benign_recall, one.benign_recall_lookalike)
        fid = "-" if one.fid is None else f"{one.fid:.2f}"
        rows.append((f"{one.mu:g}", *map(cell, shares), fid, "chosen" if one == chosen else ""))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
