"""The command `explain` on a tiny pipeline: knock-outs and random controls, sizes, the texts of attacks, resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.dossier.explain import attacked_texts, explain
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt


@pytest.fixture
def run(
    pipeline: Path, adapter: Path, prompts_csv: Path, tmp_path: Path, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: judge)

    def run(**changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {
            "pipeline": str(pipeline), "adapter": str(adapter), "prompts": str(prompts_csv), "judge": "x",
            "out": str(tmp_path / "out"), "steps": 2, "ranges": 2, "controls": 1, "batch_size": 4, "device": "cpu",
        }  # fmt: skip
        return explain(**(given | changes))

    return run


def attack_folder(pipeline: Path, folder: Path, prompts: list[Prompt]) -> Path:
    """What `attack` leaves of an attack by other words and of one by weights, as far as it is read."""
    for name in ("words", "weights"):
        gallery = Gallery(folder / "images" / name, "aligned-2", {}, prompts, DrawingSettings(steps=1, device="cpu"))
        gallery.draw(load_pipeline(pipeline, Arm(), "cpu", "float32"), None, lambda _: None)
    point = {"asr": 0.5, "n": 2, "errors": 0, "interval": [0.1, 0.9]}
    points = [{"budget": 0, **point, "asr": 0.9}, {"budget": 1, **point, "asr": 0.25}, {"budget": 2, **point}]
    attack = {"budget": "tries", "arms": {"aligned": points}}
    attacks = {
        name: attack | {"settings": {"class": f"lit_safety.attacks.x.{kind}"}}
        for name, kind in (("words", "Paraphrases"), ("weights", "FineTune"))
    }
    report = {"attacks": attacks, "protocol": {"arms": {"base": {}, "aligned": {}}}}
    (folder / "attacks.json").write_text(json.dumps(report))
    return folder


def test_what_attacks_found_is_read_off_their_images(pipeline: Path, tmp_path: Path, small_set: list[Prompt]) -> None:
    (found,) = attacked_texts(attack_folder(pipeline, tmp_path, small_set[:2]), "aligned")
    assert (found.name, found.asr) == ("words", 0.5)
    assert [(one.prompt, one.seed, one.category) for one in found.prompts] == [
        (one.prompt, one.seed, one.category) for one in small_set[:2]
    ]
    with pytest.raises(UserError, match="--attacked_arm other"):
        attacked_texts(tmp_path, "other")


def test_the_report_holds_what_it_promises_and_a_second_call_the_same_bytes(
    run: Callable[..., dict[str, Any]], pipeline: Path, tmp_path: Path, small_set: list[Prompt]
) -> None:
    attacks = str(attack_folder(pipeline, tmp_path / "attacks", small_set[:2]))
    found = run(attacks=attacks)
    out = tmp_path / "out"
    groups = {one["group"] for one in found["knock_outs"]}
    assert groups == {"blocks", "kinds", "times"}
    for one in found["knock_outs"]:
        assert one["harm"]["n"] == 3  # two explicit prompts and an implicit one
        assert one["kept"]["n"] == 3
        assert one["alone"]["harm"]["n"] == 3
        for control in one["controls"]:
            assert len(control.get("layers", control.get("steps"))) == (one["layers"] or len(one["steps"]))
            assert 2 * control.get("shared", 0) <= one["layers"]
    assert sum(one["energy"] for one in found["knock_outs"] if one["group"] == "blocks") == pytest.approx(1.0)
    halves = [one for one in found["knock_outs"] if one["group"] == "times"]
    assert [one["steps"] for one in halves] == [[1], [2]]
    # with the first half alone is without the second half
    assert halves[0]["alone"]["harm"] == halves[1]["harm"]
    assert found["sizes"].keys() == {"explicit", "implicit", "lookalike", "clean", "attacked: words"}
    assert found["gate"]["clean"] == 1.0
    assert all(size > 0 for size in found["sizes"]["clean"]["ranges"])
    same = found["sizes"]["attacked: words"]["all"]
    assert same == pytest.approx(found["sizes"]["explicit"]["all"], rel=1e-3)  # they are the same two prompts
    assert found["predicts"]["attacks"] == [{"attack": "words", "size": same, "asr": 0.5}]
    assert found["predicts"]["rank_correlation"] is None
    assert all(0 <= row["energy"] <= 1.0001 for rows in found["energy"].values() for row in rows)
    page = (out / "index.html").read_text()
    assert page.count("<svg") >= 6
    before = {name: (out / name).read_bytes() for name in ("explain.json", "index.html")}
    written = max(file.stat().st_mtime_ns for file in (out / "images").rglob("*.png"))
    run(attacks=attacks)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert max(file.stat().st_mtime_ns for file in (out / "images").rglob("*.png")) == written


def test_what_cannot_be_told_is_refused(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="--ranges 3"):
        run(ranges=3)
    with pytest.raises(UserError, match="--precision"):
        run(precision="bfloat16")
    with pytest.raises(UserError, match="--prompts"):
        run(explicit=0, implicit=0, adversarial=0)
