"""One picture of what each user sees: a row a prompt, a column a user, the same initial noise along a row."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lit_safety.data.images import rgb
from lit_safety.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lit_safety.evaluation.judges import Judge

TILE = 160
GAP = 12
LEFT = 210
FRAME = 4
INK, GREY, RED, PAPER = (24, 27, 34), (96, 102, 114), (208, 38, 48), (255, 255, 255)


def draw_grid(
    pipe: Any,
    prompts: Sequence[str],
    users: Sequence[str | None] | Tensor,
    seeds: Sequence[int],
    batch_size: int = 8,
    tick: Callable[[int], None] | None = None,
    **options: Any,
) -> list[list[Image.Image]]:
    """Draw every prompt for every user; `rows[prompt][user]`.

    Args:
        pipe: a pipeline that `load_psa` has prepared.
        prompts: what is drawn.
        users: user ids, None for the null user; or embeddings (U, D).
        seeds: one a prompt, so that along a row only the user differs.
        batch_size: pictures drawn at once.
        tick: is told how many pictures were drawn just now.
        options: go to the pipeline's call, such as `num_inference_steps` and `guidance_scale`.
    """
    import torch

    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")
    cells = [(prompt, user) for prompt in range(len(prompts)) for user in range(len(users))]
    pictures: list[Image.Image] = []
    for start in range(0, len(cells), batch_size):
        batch = cells[start : start + batch_size]
        if isinstance(users, torch.Tensor):
            whose: dict[str, Any] = {"user_embeds": users[[user for _, user in batch]]}
        else:
            whose = {"user": [users[user] for _, user in batch]}
        pictures += pipe(
            prompt=[prompts[prompt] for prompt, _ in batch],
            generator=[torch.Generator("cpu").manual_seed(seeds[prompt]) for prompt, _ in batch],
            **whose,
            **options,
        ).images
        if tick is not None:
            tick(len(batch))
    width = len(users)
    return [pictures[row * width : (row + 1) * width] for row in range(len(prompts))]


def draw_plain(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 8,
    tick: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Draw every prompt with a pipeline that knows no users; arguments as in `draw_grid`."""
    import torch

    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = range(start, min(start + batch_size, len(prompts)))
        pictures += pipe(
            prompt=[prompts[row] for row in part],
            generator=[torch.Generator("cpu").manual_seed(seeds[row]) for row in part],
            **options,
        ).images
        if tick is not None:
            tick(len(part))
    return pictures


def frames(
    judge: Judge, rows: Sequence[Sequence[Image.Image]], banned: Sequence[Collection[str]]
) -> tuple[list[list[Image.Image]], list[list[bool]]]:
    """The pictures as they may be shown, and which of them get a red frame.

    Framed is what the judge says the column's user bans, or could not judge; blurred what it calls harmful or could not
    judge, unless its pictures cannot harm anybody.

    Args:
        judge: says what is in the pictures.
        rows: pictures by prompt, then by column.
        banned: what each column's user bans.
    """
    from lit_safety.evaluation.judges import JudgeError
    from lit_safety.evaluation.judging import judge_safely

    blur = not getattr(judge, "harmless", False)
    shown, red = [], []
    for row in rows:
        verdicts = judge_safely(judge, row)
        red.append(
            [isinstance(v, JudgeError) or bool(v.present & set(b)) for v, b in zip(verdicts, banned, strict=True)]
        )
        veiled = [blur and (isinstance(v, JudgeError) or v.harmful) for v in verdicts]
        shown.append(
            [
                p.filter(ImageFilter.GaussianBlur(p.width / 8)) if veil else p
                for p, veil in zip(row, veiled, strict=True)
            ]
        )
    return shown, red


def user_grid(
    rows: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    users: Sequence[str],
    notes: Mapping[str, str] | None = None,
    tile: int = TILE,
    red: Sequence[Sequence[bool]] | None = None,
) -> Image.Image:
    """The labelled sheet.

    Args:
        rows: pictures by prompt, then by user.
        prompts: a label a row.
        users: a label a column.
        notes: a line below a user's label, such as what the user bans.
        tile: side of a picture on the sheet in pixels; small ones are enlarged without smoothing.
        red: which pictures get a red frame, by prompt, then by user; None: none.

    Raises:
        UserError: there is not one picture for every prompt and user.
    """
    if not prompts or not users or [len(row) for row in rows] != [len(users)] * len(prompts):
        raise UserError(f"a grid of {len(prompts)} prompts and {len(users)} users needs that many pictures")
    bold, small = ImageFont.load_default(17), ImageFont.load_default(15)
    above = [_wrap(user, bold, tile) for user in users]
    below = [_wrap((notes or {}).get(user, ""), small, tile) for user in users]
    head = GAP + 22 * max(map(len, above)) + 19 * max(map(len, below)) + GAP // 2
    beside = [_wrap(prompt, small, LEFT - 2 * GAP) for prompt in prompts]
    heights = [max(tile, 19 * len(lines)) + GAP for lines in beside]
    sheet = Image.new("RGB", (LEFT + len(users) * (tile + GAP), head + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column in range(len(users)):
        x = LEFT + column * (tile + GAP)
        pen.multiline_text((x, GAP), "\n".join(above[column]), INK, bold, spacing=4)
        pen.multiline_text((x, GAP + 22 * len(above[column])), "\n".join(below[column]), GREY, small, spacing=4)
    y = head
    for number, (row, lines, height) in enumerate(zip(rows, beside, heights, strict=True)):
        pen.multiline_text((GAP, y), "\n".join(lines), INK, small, spacing=4)
        for column, picture in enumerate(row):
            x = LEFT + column * (tile + GAP)
            sheet.paste(_square(picture, tile), (x, y))
            if red is not None and red[number][column]:  # in the gap, over no pixel
                around = (x - FRAME, y - FRAME, x + tile + FRAME - 1, y + tile + FRAME - 1)
                pen.rectangle(around, outline=RED, width=FRAME)
        y += height
    return sheet


def _square(picture: Image.Image, side: int) -> Image.Image:
    enlarge = max(picture.size) < side
    how = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    return rgb(picture).resize((side, side), how)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    letters = max(4, int(width / font.getlength("abcdefghij") * 10))
    return textwrap.wrap(text, letters) if text else []
