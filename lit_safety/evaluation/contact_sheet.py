"""before_after.png: what a person is shown first. A column a prompt, a row an arm, the same seed in a column."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.core.images import open_image
from lit_safety.evaluation.metrics import flat, summarise
from lit_safety.judges.judge import JudgeError, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from lit_safety.evaluation.results import ArmResult, Results


TILE = 160
GAP = 16
FRAME = 6
COLUMNS = 8
LEFT = 190
INK, GREY, RED, PAPER = (24, 27, 34), (96, 102, 114), (208, 38, 48), (255, 255, 255)


def contact_sheet(results: Results, blur: bool) -> Image.Image:
    """Two bands, harmful prompts above benign ones, each with a row an arm.

    Args:
        results: prompts, images and verdicts.
        blur: blur what the judge calls harmful, or could not judge.
    """
    shares = {name: flat(summarise(results.rows(name))) for name in results.arms}
    bands = [
        ("Prompts that ask for harm", harmful_rows(results), lambda arm: _say("harm in", shares[arm].get("ip"))),
        ("Harmless prompts", benign_rows(results), lambda arm: _say("as asked", shares[arm].get("benign_recall"))),
    ]
    bands = [band for band in bands if band[1]]
    small, bold, large = _font(17), _font(19), _font(26)
    wide = max(len(rows) for _, rows, _ in bands)
    letters = int(TILE / small.getlength("abcdefghij") * 10)
    captions = {row: textwrap.wrap(results.prompts[row].prompt, letters) for _, rows, _ in bands for row in rows}
    head = 40
    heights = [head + 26 + 21 * max(len(captions[r]) for r in rows) + 16 for _, rows, _ in bands]
    total = sum(h + len(results.arms) * (TILE + GAP) + 22 for h in heights) + 50
    sheet = Image.new("RGB", (LEFT + wide * (TILE + GAP) + GAP, total), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = 14
    for (name, rows, figure), height in zip(bands, heights, strict=True):
        pen.text((GAP, y), name, INK, large)
        for column, row in enumerate(rows):
            x = LEFT + column * (TILE + GAP)
            pen.text((x, y + head), _heading(results, row), GREY, bold)
            pen.multiline_text((x, y + head + 26), "\n".join(captions[row]), INK, small, spacing=4)
        y += height
        for arm_name, arm in results.arms.items():
            label = "\n".join(textwrap.wrap(arm_name, 16))
            pen.multiline_text((GAP, y + 44), label, INK, bold)
            pen.text((GAP, y + 50 + 24 * (label.count("\n") + 1)), figure(arm_name), GREY, small)
            for column, row in enumerate(rows):
                x = LEFT + column * (TILE + GAP)
                sheet.paste(tile(arm, row, blur), (x, y))
                _frame(pen, x, y, arm.verdicts[row])
            y += TILE + GAP
        y += 22
    pen.text((GAP, y), "Same prompt and seed in a column. Red frame: the judge sees harm. "
             "Shown: the first prompt of a kind on which the base drew what was asked.", GREY, small)  # fmt: skip
    return sheet


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
        asked.sort(key=lambda i: not results.prompts[i].benign)  # what stays is seen best beside what goes
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
        return Image.new("RGB", (side, side), (214, 216, 222))
    enlarge = max(image.size) < side
    image = image.resize((side, side), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
    if blur and (isinstance(verdict, JudgeError) or verdict.harmful):
        return image.filter(ImageFilter.GaussianBlur(side / 8))
    return image


def _shows(results: Results, row: int, harmful: bool) -> bool:
    prompt, verdict = results.prompts[row], results.arms["base"].verdicts[row]
    if isinstance(verdict, JudgeError) or verdict.harmful is not harmful:
        return False
    known = set(results.judges[0].settings.get("labels", ()))
    asked = {*prompt.benign, *([prompt.concept] if harmful and prompt.concept else [])}
    return (asked & known) <= verdict.present


def _say(what: str, share: float | str | None) -> str:
    return f"{what} {100 * share:.1f}%" if isinstance(share, float | int) else share or ""


def _first(rows: list[int], good: Callable[[int], bool]) -> int:
    return next((row for row in rows if good(row)), rows[0])


def _heading(results: Results, row: int) -> str:
    prompt = results.prompts[row]
    if prompt.harmful:
        return prompt.category
    return "look-alike" if prompt.kind == "lookalike" else {2: "two objects"}.get(len(prompt.benign), "clean")


def _frame(pen: ImageDraw.ImageDraw, x: int, y: int, verdict: Verdict | JudgeError) -> None:
    around = (x - FRAME, y - FRAME, x + TILE + FRAME - 1, y + TILE + FRAME - 1)  # in the gap, over no pixel
    if isinstance(verdict, JudgeError):
        pen.rectangle(around, outline=GREY, width=FRAME)
        pen.text((x + 8, y + TILE - 28), "no verdict", INK, _font(17), stroke_width=3, stroke_fill=PAPER)
    elif verdict.harmful:
        pen.rectangle(around, outline=RED, width=FRAME)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
