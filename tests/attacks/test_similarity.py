"""What suffix searches maximise."""

from pathlib import Path

import pytest
import torch

from lit_safety.attacks.similarity import ConceptDirection, PredictionMatch, flat, text_rows
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm


def test_the_concept_direction_by_hand(make_target, prompts_csv: Path) -> None:
    """goal = E(a gun) + 2 (mean(E(a gun), E(red gun)) - mean(E(a cat), E(a house))); score: cosine to it."""
    target = make_target()
    network = target.public_network()
    rows = flat(text_rows(network, ["a gun", "red gun", "a cat", "a house", "a gun s"])).double()
    goal = rows[0] + 2 * ((rows[0] + rows[1]) / 2 - (rows[2] + rows[3]) / 2)
    expected = float(rows[4] @ goal / (rows[4].norm() * goal.norm()))
    direction = ConceptDirection(str(prompts_csv), strength=2.0)
    direction.check(target.prompts)
    score = direction.likeness(target, network, ["a gun", "red gun"])
    found = score(text_rows(network, ["a gun s"]), torch.tensor([0]))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_the_direction_needs_prompts_of_every_concept(make_target, prompts_csv: Path, tmp_path: Path) -> None:
    text = prompts_csv.read_text()
    other = tmp_path / "other.csv"
    other.write_text(text.replace("explicit,violence", "explicit,hate"))
    with pytest.raises(UserError, match=r"other.csv: holds no explicit prompt of violence"):
        ConceptDirection(str(other)).check(make_target().prompts)
    other.write_text("\n".join(line for line in text.splitlines() if "clean" not in line) + "\n")
    with pytest.raises(UserError, match="no clean prompt"):
        ConceptDirection(str(other)).check(make_target().prompts)


def test_the_prediction_of_the_base_is_matched_by_the_base_alone(
    make_target, pair_shards: Path, tiny_adapter: Path
) -> None:
    """For the prompt itself the base's error is 0 and the highest; another text and another arm are further away."""
    match = PredictionMatch(str(pair_shards), times=[0.5])
    scores = {}
    for name, arm in (("base", Arm()), ("other", Arm(adapter=str(tiny_adapter)))):
        target = make_target(arm)
        network = target.network()
        score = match.likeness(target, network, ["a gun", "red gun"])
        scores[name] = [
            score(text_rows(network, texts), torch.arange(2)) for texts in (["a gun", "red gun"], ["s", "e"])
        ]
    assert scores["base"][0].tolist() == pytest.approx([0.0, 0.0], abs=1e-10)
    assert (scores["base"][1] < -1e-9).all()
    assert (scores["other"][0] < -1e-6).all()


def test_the_prediction_needs_images_of_every_concept(make_target, category_shards: Path, rows) -> None:
    from dataclasses import replace

    target = make_target(prompts=[replace(rows[0], category="sexual")])
    match = PredictionMatch(str(category_shards))
    with pytest.raises(UserError, match="hold no rejected image labelled harmful"):
        match.likeness(target, target.network(), ["a gun"])
    with pytest.raises(UserError, match=r"must lie in \[0, 1\)"):
        PredictionMatch("x", times=[1.0])
