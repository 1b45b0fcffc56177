"""One picture of what each user sees: a row a prompt, a column a user, the same initial noise along a row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from lit_safety.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TILE = 160
GAP = 12
LEFT = 210
INK, GREY, PAPER = (24, 27, 34), (96, 102, 114), (255, 255, 255)


def draw_for_users(
    pipe: Any,
    prompts: Sequence[str],
    users: Sequence[str | None] | Tensor,
    seeds: Sequence[int],
    batch_size: int = 8,
    **options: Any,
) -> list[list[Image.Image]]:
    """Draw every prompt for every user; `rows[prompt][user]`.

    Args:
        pipe: a pipeline that `load_psa` has prepared.
        prompts: what is drawn.
        users: user ids, None for the null user; or embeddings (U, D).
        seeds: one a prompt, so that along a row only the user differs.
        batch_size: pictures drawn at once.
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
    width = len(users)
    return [pictures[row * width : (row + 1) * width] for row in range(len(prompts))]


def user_grid(
    rows: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    users: Sequence[str],
    notes: Mapping[str, str] | None = None,
    tile: int = TILE,
) -> Image.Image:
    """The labelled sheet.

    Args:
        rows: pictures by prompt, then by user.
        prompts: a label a row.
        users: a label a column.
        notes: a line below a user's label, such as what the user bans.
        tile: side of a picture on the sheet in pixels; small ones are enlarged without smoothing.

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
    for row, lines, height in zip(rows, beside, heights, strict=True):
        pen.multiline_text((GAP, y), "\n".join(lines), INK, small, spacing=4)
        for column, picture in enumerate(row):
            sheet.paste(_square(picture, tile), (LEFT + column * (tile + GAP), y))
        y += height
    return sheet


def _square(picture: Image.Image, side: int) -> Image.Image:
    enlarge = max(picture.size) < side
    how = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((side, side), how)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    letters = max(4, int(width / font.getlength("abcdefghij") * 10))
    return textwrap.wrap(text, letters) if text else []
