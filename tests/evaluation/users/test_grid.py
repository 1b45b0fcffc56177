from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.evaluation.users.grid import draw_grid, user_grid
from lit_safety.report.sheet import GAP, LEFT


class Recorder:
    """Stands for a pipeline: an image's colour says prompt, user and seed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> Any:
        self.sizes.append(len(prompt))
        who = options["user"] if "user" in options else [str(int(row[0])) for row in options["user_embeds"]]
        colours = [(int(p), int(u or 9), g.initial_seed()) for p, u, g in zip(prompt, who, generator, strict=True)]
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), colour) for colour in colours])


@pytest.mark.parametrize("users", [["3", "4", None], torch.tensor([[3.0], [4.0], [9.0]])])
def test_every_prompt_is_drawn_for_every_user_from_the_row_s_seed(users: Any):
    pipe = Recorder()
    rows = draw_grid(pipe, ["1", "2"], users, seeds=[50, 60], batch_size=4)
    assert [[image.getpixel((0, 0)) for image in row] for row in rows] == [
        [(1, 3, 50), (1, 4, 50), (1, 9, 50)],
        [(2, 3, 60), (2, 4, 60), (2, 9, 60)],
    ]
    assert pipe.sizes == [4, 2]
    with pytest.raises(UserError, match="1 seeds for 2 prompts"):
        draw_grid(pipe, ["1", "2"], users, seeds=[50])


def test_prompts_in_rows_users_in_columns_under_their_labels():
    """Every image is at the place of its row and column, and no text covers an image."""
    tile = 60
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    rows = [[Image.new("RGB", (8, 8), colour) for colour in row] for row in colours]
    long = "a very long prompt with many words that needs several lines on the sheet to be read at all " * 2
    sheet = user_grid(rows, [long, "short"], ["anna", "ben"], {"anna": "bans violence"}, tile=tile)
    assert sheet.width == LEFT + 2 * (tile + GAP)
    for column in range(2):
        strip = sheet.crop((LEFT + column * (tile + GAP), 0, LEFT + column * (tile + GAP) + tile, sheet.height))
        counts = {colour: count for count, colour in strip.getcolors(1 << 16)}
        assert [counts[row[column]] for row in colours] == [tile * tile] * 2
    beside = sheet.crop((0, 0, LEFT - GAP, sheet.height))
    assert len(beside.getcolors(1 << 16)) > 2  # the prompts
    assert sheet.crop((LEFT - GAP, 0, LEFT, sheet.height)).getcolors() == [(GAP * sheet.height, (255, 255, 255))]


def test_a_missing_image_is_an_error():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="2 prompts and 1 users"):
        user_grid([[image], []], ["a", "b"], ["u"])
