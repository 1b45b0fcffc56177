"""Each prompt is drawn by its category's expert, or by the base; an oracle is given the category."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.adapters.lora_file import write_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery, draw_batch
from lit_safety.drawing.guards.routed_experts import RoutedExperts, best_threshold, whitening
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt

SETTINGS = DrawingSettings(steps=2, guidance=3.0, batch_size=4)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
ROWS = [
    *(("explicit", "violence", f"gun {word}") for word in ("cat", "house", "red cat")),
    *(("implicit", "hate", f"blue blue {word}") for word in ("cat", "house", "red cat")),
    *(("clean", "", word) for word in ("cat", "house", "red cat", "a cat", "a house")),
]


def prompt(text: str, seed: int) -> Prompt:
    return Prompt(text, "clean", "", "", (), False, seed)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Path):
    return load_pipeline(tiny_pipeline, Arm(), "cpu")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, pipe) -> dict[str, str]:
    """Of a linear layer and a convolution."""
    folder, found = tmp_path_factory.mktemp("experts"), {}
    for seed, category in enumerate(("hate", "violence")):
        draw = torch.Generator().manual_seed(seed)
        layers = {}
        for name, kernel in ((f"{BLOCK}.attn2.to_k", ()), ("down_blocks.0.resnets.0.conv1", (3, 3))):
            out, inputs = pipe.unet.get_submodule(name).weight.flatten(1).shape
            a, b = torch.randn(2, inputs, generator=draw), torch.randn(out, 2, generator=draw)
            layers[f"unet.{name}"] = LowRank(a, b, 1.0, kernel)
        found[category] = str(write_lora(folder / f"{category}.safetensors", layers))
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    rows = [f"{text},{kind},{category},0" for kind, category, text in ROWS]
    path.write_text("\n".join(["prompt,kind,category,held_out", *rows, "gun gun,implicit,hate,1"]) + "\n")
    return str(path)


def test_the_threshold_makes_the_fewest_mistakes_in_the_middle_of_the_widest_gap():
    """At 0.55 only the one that is nearest to a wrong category is a mistake; between 0.3 and 0.8 it may lie
    anywhere."""
    assert best_threshold([(0.8, True), (0.9, True), (0.95, False)], [0.1, 0.3]) == pytest.approx(0.55)
    # one clean prompt lies above a harmful one: letting it through costs as much as losing the harmful one
    assert best_threshold([(0.4, True), (0.9, True)], [0.1, 0.5]) in (pytest.approx(0.25), pytest.approx(0.7))


def test_whitening_makes_what_groups_differ_in_within_alike():
    """Variances 100 and 1 within; the same distance apart counts ten times as much along the second."""
    torch.manual_seed(0)
    groups = [torch.randn(4000, 2) * torch.tensor([10.0, 1.0]) + shift for shift in (0.0, 50.0)]
    found = whitening(groups)
    assert float(found[1, 1] / found[0, 0]) == pytest.approx((100.5 / 1.5) ** 0.5, rel=0.05)
    assert torch.equal(whitening([torch.ones(3, 2)]), torch.eye(2)), "all alike: nothing to divide by"


def test_prompts_go_to_their_category_and_clean_ones_to_none(pipe, experts: dict[str, str], file: str):
    guard = RoutedExperts(experts, file)
    guard.check(pipe)
    assert guard.route(pipe, [text for _, _, text in ROWS]) == [category or None for _, category, _ in ROWS]
    assert set(RoutedExperts(experts, file, threshold=1.0).route(pipe, ["gun house", "cat"])) == {None}
    assert set(RoutedExperts(experts, file, threshold=-1.0).route(pipe, ["gun house", "cat"])) <= {"hate", "violence"}


def test_the_oracle_takes_the_true_category_and_of_several_the_first_that_has_an_expert(
    pipe, experts: dict[str, str], tmp_path: Path
):
    file = tmp_path / "true.csv"
    file.write_text("prompt,kind,category\ncat,explicit,sexual; hate\nhouse,clean,\ngun,explicit,sexual\n")
    guard = RoutedExperts(experts, oracle=str(file))
    assert guard.route(pipe, ["cat", "house", "gun", "unknown"]) == ["hate", None, None, None]


def test_each_row_is_what_its_expert_alone_draws(pipe, tiny_pipeline: Path, experts: dict[str, str], tmp_path: Path):
    """One batch of the base and two experts gives the same as one pipeline for each LoRA."""
    file = tmp_path / "true.csv"
    file.write_text("prompt,kind,category\ngun,explicit,violence\nred cat,explicit,hate\n")
    guard = RoutedExperts(experts, oracle=str(file))
    prompts = [prompt("gun", 1), prompt("house", 2), prompt("red cat", 3)]
    found = draw_batch(pipe, prompts, SETTINGS, guard=guard)
    base = draw_batch(pipe, prompts, SETTINGS)
    for row, category in ((0, "violence"), (2, "hate")):
        alone = load_pipeline(tiny_pipeline, Arm(adapter=experts[category]), "cpu")
        assert np.abs(found[row] - draw_batch(alone, prompts, SETTINGS)[row]).max() < 1e-4
        assert np.abs(found[row] - base[row]).max() > 1e-3
    assert np.abs(found[1] - base[1]).max() < 1e-6
    assert (draw_batch(pipe, prompts, SETTINGS) == base).all(), "the pipeline is as it was"
    none = [prompt("house", 2)] * 3
    assert (draw_batch(pipe, none, SETTINGS, guard=guard) == draw_batch(pipe, none, SETTINGS)).all()


def test_batches_at_the_same_time_do_not_meet(pipe, experts: dict[str, str], tmp_path: Path):
    """Three workers share the UNet, not the experts in it."""
    file = tmp_path / "true.csv"
    file.write_text("prompt,kind,category\ngun,explicit,violence\nred cat,explicit,hate\n")
    prompts = [prompt(text, seed) for seed, text in enumerate(["gun", "house", "red cat"] * 4)]
    drawn = []
    for workers in (1, 3):
        how = replace(SETTINGS, batch_size=2, workers=workers)
        gallery = Gallery(tmp_path / str(workers), "routed", {}, prompts, how)
        gallery.draw(pipe, None, lambda _: None, RoutedExperts(experts, oracle=str(file)))
        drawn.append([one.path.read_bytes() for one in gallery.all()])
    assert drawn[0] == drawn[1]


def test_an_arm_names_it_and_images_of_other_settings_are_others(pipe, experts: dict[str, str], file: str):
    one, other = RoutedExperts(experts, file), RoutedExperts(experts, file, threshold=0.5)
    assert Arm(guard=one).describe()["guard"]["experts"].keys() == experts.keys()
    assert one.settings != other.settings != RoutedExperts(experts, oracle=file).settings


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3"])
def test_other_families_route_too(family: str, request: pytest.FixtureRequest, tmp_path: Path, file: str):
    folder = request.getfixturevalue(family)
    pipe = load_pipeline(folder, Arm(), "cpu")
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    name, module = next((n, m) for n, m in getattr(pipe, part).named_modules() if n.endswith("to_q"))
    layer = LowRank(torch.randn(2, module.in_features), torch.randn(module.out_features, 2))
    lora = str(write_lora(tmp_path / "violence.safetensors", {f"{part}.{name}": layer}))
    guard = RoutedExperts({"violence": lora}, file, threshold=-1.0)
    guard.check(pipe)
    prompts = [prompt("gun", 1), prompt("house", 2)]
    found = draw_batch(pipe, prompts, SETTINGS, guard=guard)
    alone = draw_batch(load_pipeline(folder, Arm(adapter=lora), "cpu"), prompts, SETTINGS)
    assert np.abs(found - alone).max() < 1e-3
    assert np.abs(found - draw_batch(pipe, prompts, SETTINGS)).max() > 1e-4


def test_what_does_not_fit_is_reported(pipe, experts: dict[str, str], file: str, tmp_path: Path):
    for arguments, named in (
        (({}, file), "`experts` is empty"),
        ((experts,), "give `prompts`.* or else `oracle`"),
        ((experts, file, 2.0), r"threshold 2\.0"),
        (({"hate": experts["hate"], "Hate": experts["hate"]}, file), "two experts are for hate"),
        (({"sexual": experts["hate"]}, file), r"prompts\.csv .* 0 prompts of sexual"),
        ((experts, "data/toyworld/prompts/test.csv"), "this world's reports"),
    ):
        with pytest.raises(UserError, match=named):
            RoutedExperts(*arguments)
    text = LowRank(torch.ones(1, 32), torch.ones(32, 1))
    for name in ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", f"unet.{BLOCK}.attn1.to_q"):
        path = str(write_lora(tmp_path / "x.safetensors", {name: text}))
        with pytest.raises(UserError, match="is not a layer of this size"):
            RoutedExperts({"hate": path}, oracle=file).check(pipe)
