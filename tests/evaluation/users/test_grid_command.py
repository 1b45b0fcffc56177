from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.evaluation.users.grid import different_users, frames, grid
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.report.sheet import FRAME, GAP, LEFT, RED, TILE
from tests.helpers.user_adapters import save_random_adapter, save_users
from tests.helpers.user_profiles import profile

PEOPLE = [profile("a", ("violence",), "seen"), profile("b", ("hate",), "unseen"), profile("c", (), "unseen")]


def test_a_row_a_prompt_and_a_column_a_user(pipeline: Path, adapter: Path, tmp_path: Path):
    users = save_users(tmp_path / "people", PEOPLE)
    save_random_adapter(pipeline, tmp_path / "psa")
    given = {"pipeline": str(pipeline), "adapter": str(tmp_path / "psa"), "users": str(users), "steps": 2}
    grid(**given, prompts=["a gun", "a car"], out=str(tmp_path / "new" / "grid.png"), loras={str(adapter): 1.0})
    with Image.open(tmp_path / "new" / "grid.png") as sheet:
        assert sheet.width == LEFT + 4 * (TILE + GAP)  # base, null user, b and c, who are unseen
        tiles = [sheet.crop((LEFT + n * (TILE + GAP), 200, LEFT + n * (TILE + GAP) + TILE, 280)) for n in range(4)]
    assert len({tile.tobytes() for tile in tiles}) == 4
    with pytest.raises(UserError, match="user 'zoe' is not in"):
        grid(**given, prompts=["a gun"], out=str(tmp_path / "x.png"), ids=["zoe"])
    with pytest.raises(UserError, match="--prompts"):
        grid(**given, prompts=[], out=str(tmp_path / "x.png"))


def test_users_who_differ():
    """b bans most without banning all; then whoever is farthest from those chosen: c from b by 2, then d from both."""
    banned = {"a": ("hate",), "b": ("hate", "violence"), "c": (), "d": ("sexual",)}
    assert different_users(banned, 2) == ["b", "d"]  # d differs from b in 3, a in 1, c in 2
    assert different_users(banned, 9) == ["b", "d", "a", "c"]
    with pytest.raises(UserError, match="no unseen users"):
        different_users({}, 2)


class Judge:
    name, settings, harmless = "x", {}, False

    def judge(self, images):
        shown = {0: Verdict(False), 1: Verdict(True, present=frozenset({"hate"})), 2: JudgeError("odd")}
        return [shown[image.getpixel((0, 0))[0]] for image in images]


def test_frames_where_a_user_s_bounds_are_broken():
    """Blurred: harm, or no verdict. Framed: what this user bans, or no verdict."""
    images = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in (0, 1, 2, 1)]
    for image in images:
        image.putpixel((8, 8), (200, 200, 200))
    shown, red = frames(Judge(), [images], [("hate",), ("hate",), (), ("violence",)])
    assert red == [[False, True, True, False]]
    assert [one.tobytes() == old.tobytes() for one, old in zip(shown[0], images, strict=True)] == [
        True, False, False, False,
    ]  # fmt: skip
    harmless = Judge()
    harmless.harmless = True
    assert frames(harmless, [images], [()] * 4)[0] == [images]


def test_a_red_frame_stands_in_the_gap():
    from lit_safety.evaluation.users.grid import user_grid

    image = Image.new("RGB", (8, 8))
    sheet = user_grid([[image, image]], ["p"], ["u", "v"], tile=20, red=[[False, True]])
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert counts[RED] == (20 + 2 * FRAME) ** 2 - 20 * 20
    assert counts[(0, 0, 0)] == 2 * 20 * 20
