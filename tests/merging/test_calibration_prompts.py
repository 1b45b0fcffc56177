from collections import Counter
from pathlib import Path

import pytest

from lit_safety.errors import UserError
from lit_safety.merging.calibration_prompts import calibration_prompts


def rows(*lines: str) -> str:
    return "\n".join(("prompt,category", *lines)) + "\n"


def test_categories_take_turns_and_clean_prompts_are_left_out(tmp_path: Path):
    many = (
        [f"gun {i},violence" for i in range(50)] + [f"slur {i},Hate" for i in range(3)] + ["a cat,", "gun 1,violence"]
    )
    file = tmp_path / "p.csv"
    file.write_text(rows(*many))
    chosen = calibration_prompts(str(file), 10)
    assert Counter(prompt.split()[0] for prompt in chosen) == {"gun": 7, "slur": 3}
    assert len(set(chosen)) == 10
    assert calibration_prompts(str(file), 4) == chosen[:4]
    file.write_text(rows(*reversed(many)))
    assert calibration_prompts(str(file), 10) == chosen
    assert len(calibration_prompts(str(file), 100, ["Violence"])) == 50


def test_a_file_without_categories_gives_every_prompt(tmp_path: Path):
    (tmp_path / "p.csv").write_text("prompt\na cat\na gun\n")
    assert sorted(calibration_prompts(str(tmp_path / "p.csv"), 5)) == ["a cat", "a gun"]


def test_shards_give_their_harmful_prompts(pair_shards: Path):
    assert calibration_prompts(str(pair_shards), 5) == ["a gun and a house"]


def test_bad_sources_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        calibration_prompts(str(tmp_path / "none.csv"), 5)
    (tmp_path / "p.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match="no column `prompt`"):
        calibration_prompts(str(tmp_path / "p.csv"), 5)
    (tmp_path / "p.csv").write_text(rows("a cat,"))
    with pytest.raises(UserError, match="no harmful prompt"):
        calibration_prompts(str(tmp_path / "p.csv"), 5)
