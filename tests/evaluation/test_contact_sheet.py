from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_safety.drawing.gallery import Drawn
from lit_safety.evaluation.contact_sheet import benign_rows, contact_sheet, harmful_rows, tile
from lit_safety.evaluation.run import ArmResult, Results
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.report.sheet import TILE


def arm(folder: Path, verdicts: list, side: int = 4) -> ArmResult:
    """Images of noise; None in place of a file where the verdict is an error of drawing."""
    drawn = []
    for i in range(len(verdicts)):
        noise = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(noise).save(path)
        drawn.append(Drawn(path))
    return ArmResult({}, "p", drawn, verdicts)


@pytest.fixture
def prompts(ask):
    return [
        ask("explicit", "violence", "knife", seed=1),
        ask("explicit", "violence", "knife", seed=2),
        ask("explicit", "shocking", "skull", seed=3),
        ask("clean", benign="car", seed=4),
        ask("clean", benign="car;tree", seed=5),
        ask("lookalike", benign="tree", seed=6),
    ]


@pytest.fixture
def results(tmp_path: Path, judge, prompts) -> Results:
    knife = Verdict(True, present=frozenset({"knife"}))
    safe = Verdict(False, present=frozenset({"car", "tree"}))
    verdicts = [safe, knife, JudgeError("crash"), safe, safe, safe]
    return Results(
        tmp_path, {}, prompts, [judge], {"base": arm(tmp_path, verdicts), "aligned": arm(tmp_path, verdicts)}
    )


def test_columns_are_what_the_base_drew_as_asked(results: Results) -> None:
    """violence: row 1, since the base drew no knife in row 0; shocking: its only row, though it has no verdict."""
    assert harmful_rows(results) == [1, 2]
    assert benign_rows(results) == [3, 4, 5]


def test_small_images_are_enlarged_without_smoothing(results: Results) -> None:
    shown = np.asarray(tile(results.arms["base"], 0, blur=False))
    square = TILE // 4
    assert shown.shape == (TILE, TILE, 3)
    assert (shown[:square, :square] == shown[0, 0]).all()


def test_blur_hides_what_is_harmful_or_unknown_and_nothing_else(results: Results) -> None:
    def changed(row: int) -> bool:
        sharp, blurred = (np.asarray(tile(results.arms["base"], row, blur)) for blur in (False, True))
        return bool((sharp != blurred).any())

    assert [changed(row) for row in range(6)] == [False, True, True, False, False, False]


def test_the_sheet_has_a_row_an_arm_in_two_bands(results: Results) -> None:
    two = contact_sheet(results, blur=False)
    one = contact_sheet(
        Results(results.out, {}, results.prompts, results.judges, {"base": results.arms["base"]}), False
    )
    assert two.width > 3 * TILE
    assert 2 * TILE < two.height - one.height < 2 * TILE + 40


def test_a_image_that_is_gone_leaves_a_grey_square(results: Results) -> None:
    results.arms["base"].drawn[3].path.unlink()
    assert len(set(tile(results.arms["base"], 3, blur=False).get_flattened_data())) == 1
