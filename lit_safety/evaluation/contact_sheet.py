"""before_after.png: what a person is shown first. A column a prompt, a row an arm, the same seed in a column."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.core.images import open_image
from lit_safety.evaluation.metrics import flat, summarise
from lit_safety.judges.judge import JudgeError
from lit_safety.report.sheet import GREY, NOTHING, RED, TILE, Band, Cell, Row, fit, sheet, veiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from lit_safety.evaluation.run import ArmResult, Results


COLUMNS = 8


def contact_sheet(results: Results, blur: bool) -> Image.Image:
    """Two bands, harmful prompts above benign ones, each with a row an arm.

    Args:
        results: prompts, images and verdicts.
        blur: blur what the judge calls harmful, or could not judge.
    """
    shares = {name: flat(summarise(results.rows(name))) for name in results.arms}
    bands = []
    for name, rows, says, figure in (
        ("Prompts that ask for harm", harmful_rows(results), "harm in", "ip"),
        ("Harmless prompts", benign_rows(results), "as asked", "benign_recall"),
    ):
        heads = [(_heading(results, row), results.prompts[row].prompt) for row in rows]
        lines = [
            Row(arm_name, [_cell(arm, row, blur) for row in rows], _say(says, shares[arm_name].get(figure)))
            for arm_name, arm in results.arms.items()
        ]
        bands += [Band(heads, lines, name)] if rows else []
    return sheet(
        bands,
        foot="Same prompt and seed in a column. Red frame: the judge sees harm. "
        "Shown: the first prompt of a kind on which the base drew what was asked.",
    )


def harmful_rows(results: Results) -> list[int]:
    """One explicit prompt a category on which the base drew what was asked, with a benign object where there is one.

    Without explicit prompts implicit and adversarial ones stand in. Only the base decides: which prompts the other
    arms handle well plays no part.
    """
    rows = []
    kinds = {p.kind for p in results.prompts if p.harmful}
    shown = kinds & {"explicit"} or kinds  # the others stand in where nothing is asked for by name
    for category in CATEGORIES:
        asked = [i for i, p in enumerate(results.prompts) if p.kind in shown and p.category == category]
        asked.sort(key=lambda i: not results.prompts[i].benign)  # what stays is seen best next to what goes
        rows += asked and [_first(asked, lambda i: _shows(results, i, harmful=True))]
    return rows[:COLUMNS]


def benign_rows(results: Results) -> list[int]:
    """Clean prompts for one object, for two, and look-alikes, on which the base drew what was asked, in turn."""
    pools = [
        [i for i, p in enumerate(results.prompts) if p.kind == kind and len(p.benign) in lengths]
        for kind, lengths in (("clean", (0, 1)), ("clean", (2,)), ("lookalike", (0, 1, 2)))
    ]
    rows: list[int] = []
    while any(pools) and len(rows) < COLUMNS:
        for pool in pools:
            if pool and len(rows) < COLUMNS:
                asked = {results.prompts[row].benign for row in rows}
                fresh = [i for i in pool if results.prompts[i].benign not in asked] or pool
                rows.append(_first(fresh, lambda i: _shows(results, i, harmful=False)))
                pool.remove(rows[-1])
    return sorted(rows, key=lambda i: (results.prompts[i].kind != "clean", len(results.prompts[i].benign), i))


def tile(arm: ArmResult, row: int, blur: bool, side: int = TILE) -> Image.Image:
    """A square image of `side` pixels; small ones are enlarged without smoothing."""
    drawn, verdict = arm.drawn[row], arm.verdicts[row]
    try:
        image = open_image(drawn.path)
    except UserError:
        return Image.new("RGB", (side, side), NOTHING)
    image = fit(image, side)
    return veiled(image) if blur and (isinstance(verdict, JudgeError) or verdict.harmful) else image


def _cell(arm: ArmResult, row: int, blur: bool) -> Cell:
    verdict, image = arm.verdicts[row], tile(arm, row, blur)
    if isinstance(verdict, JudgeError):
        return Cell(image, GREY, "no verdict")
    return Cell(image, RED if verdict.harmful else None)


def _shows(results: Results, row: int, harmful: bool) -> bool:
    prompt, verdict = results.prompts[row], results.arms["base"].verdicts[row]
    if isinstance(verdict, JudgeError) or verdict.harmful is not harmful:
        return False
    known = set(results.judges[0].settings.get("labels", ()))
    if harmful and prompt.concept in known and prompt.concept not in verdict.present:
        return False
    return verdict.as_asked([name for name in prompt.benign if name in known])


def _say(what: str, share: float | str | None) -> str:
    return f"{what} {100 * share:.1f}%" if isinstance(share, float | int) else share or ""


def _first(rows: list[int], good: Callable[[int], bool]) -> int:
    return next((row for row in rows if good(row)), rows[0])


def _heading(results: Results, row: int) -> str:
    prompt = results.prompts[row]
    if prompt.harmful:
        return prompt.category
    return "look-alike" if prompt.kind == "lookalike" else {2: "two objects"}.get(len(prompt.benign), "clean")
