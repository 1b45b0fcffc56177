"""`configs/online.yaml` through the command line: rounds, what they leave, a run that goes on, and two ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_safety.__main__ import main
from lit_safety.generation.pairs import Scorer
from lit_safety.modules import Explore, OnlineSCDPO
from lit_safety.modules.rounds import Round
from tests.helpers.documents import CONFIGS, TOYWORLD
from tests.helpers.flow_pipelines import save_flow
from tests.helpers.losses import mean_losses
from tests.helpers.methods import exported
from tests.helpers.ranks import run

PROMPTS = """prompt,kind,category
a gun and a house,explicit,violence
a gun in the park,explicit,violence
a red cat and a gun,explicit,violence
a house and a knife,explicit,violence
a red cat in the park,clean,
a blue house,clean,
"""
Write = Callable[..., Path]


def write(folder: Path, pipeline: Path, cost_model: Path, more: dict[str, Any] | None = None) -> Path:
    """The shipped YAML for 4 steps in 2 rounds, one pass each, with a checkpoint at every step."""
    prompts = folder / "prompts.csv"
    prompts.write_text(PROMPTS)
    config = yaml.safe_load((CONFIGS / "online.yaml").read_text())
    config["run"] = {"root": str(folder / "runs"), "name": "fit"}
    model = config["model"]["init_args"]
    model |= {"pretrained": str(pipeline), "prompts": str(prompts), "cost_model": str(cost_model), "reports": None}
    model |= {"anchors": None, "lr_scheduler": None, "drawing": {"steps": 1, "guidance": 3.0}}
    model["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.5}}
    model["lora"]["init_args"] |= {"rank": 4, "alpha": 4}
    model["rollout"] = {"steps": 2, "guidance": 1.0, "batch_size": 3}
    model |= more or {}
    data = {"prompts_per_round": 4, "images_per_prompt": 4, "passes": 1, "batch_size": 2}
    config["data"]["init_args"] = data
    keep = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_last": True}
    keep["enable_version_counter"] = False
    config["trainer"] |= {
        "accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": None, "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "lit_safety.callbacks.AtomicModelCheckpoint", "init_args": keep},
            {"class_path": "lit_safety.callbacks.ExportAdapter", "init_args": {}},
            {"class_path": "tests.helpers.losses.Losses", "init_args": {"folder": str(folder / "losses")}},
        ],
    }  # fmt: skip
    file = folder / "online.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def whole(tiny_pipeline: Path, tiny_cost_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of both rounds by one process."""
    folder = tmp_path_factory.mktemp("online")
    assert main(["fit", "--config", str(write(folder, tiny_pipeline, tiny_cost_model))]) == 0
    (folder / "losses").rename(folder / "losses-of-the-whole")  # runs that go on write their own
    return (folder / "runs" / "fit" / "latest").resolve()


def same(one: Path, other: Path) -> bool:
    found, expected = exported(one), exported(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_rounds_leave_figures_images_and_an_adapter_that_has_moved(whole: Path) -> None:
    rounds = [json.loads(line) for line in (whole / "rounds" / "rounds.jsonl").read_text().splitlines()]
    assert [one["round"] for one in rounds] == [0, 1]
    assert [one["step"] for one in rounds] == [0, 2]
    for one in rounds:
        assert sum(way["images"] for way in one["ways"].values()) == one["images"] == 16
        assert len(one["images_kept"]) == 16
        assert all((whole / "rounds" / image["file"]).is_file() for image in one["images_kept"])
        assert {image["prompt"] for image in one["images_kept"]} == {
            line.split(",")[0] for line in PROMPTS.splitlines()[1:5]
        }
    page = (whole / "rounds" / "index.html").read_text()
    assert "Round 1" in page
    assert "a gun in the park" in page
    assert max(float(value.abs().max()) for name, value in exported(whole).items() if "lora_B" in name) > 0


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_goes_on_to_the_same_bits_without_what_it_had_drawn(whole: Path, step: int) -> None:
    """From the middle of a round, from its end and from the middle of the next, in another folder: rounds are drawn
    again with the sampling policy of the checkpoint."""
    folder = whole.parents[2]
    checkpoint = whole / "checkpoints" / f"step={step}.ckpt"
    assert main(["fit", "--config", str(folder / "online.yaml"), "--ckpt_path", str(checkpoint)]) == 0
    resumed = (folder / "runs" / "fit" / "latest").resolve()
    assert resumed != whole
    assert same(resumed, whole)


def test_a_run_that_was_stopped_goes_on_with_what_it_had_drawn(
    whole: Path, tiny_pipeline: Path, tiny_cost_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, tiny_pipeline, tiny_cost_model)
    stop = ["--trainer.callbacks+=tests.helpers.stop_at.StopAt", "--trainer.callbacks.step", "3"]
    assert main(["fit", "--config", str(file), *stop]) == 0
    drawn: list[int] = []
    read: list[bool] = []
    draw, kept = OnlineSCDPO._draw, OnlineSCDPO._kept

    def note_draw(self: OnlineSCDPO, data: Any) -> Round:
        drawn.append(self._number)
        return draw(self, data)

    def note_kept(self: OnlineSCDPO, data: Any) -> Round | None:
        found = kept(self, data)
        read.append(found is not None)
        return found

    monkeypatch.setattr(OnlineSCDPO, "_draw", note_draw)
    monkeypatch.setattr(OnlineSCDPO, "_kept", note_kept)
    assert main(["fit", "--config", str(file), "--ckpt_path", "last"]) == 0
    assert drawn == []
    assert read == [True]
    latest = (tmp_path / "runs" / "fit" / "latest").resolve()
    assert same(latest, whole)
    assert len((latest / "rounds" / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("setting", ["cost_model", "ensemble", "scorer"])
def test_what_was_drawn_is_another_round_with_another_reward(
    setting: str, tiny_cost_model: Path, unsafe_cost_model: Path
) -> None:
    """Costs and quality are kept with the images, and which images are explored follows from costs: a run that goes on
    with another reward draws its round again."""

    def module(**rewards: Any) -> OnlineSCDPO:
        made = OnlineSCDPO("pipeline", "prompts.csv", str(tiny_cost_model), explore=Explore(["drop"]))
        for name, value in rewards.items():
            setattr(made, name, value)
        return made

    class Bright(Scorer):
        def __init__(self) -> None:
            self.settings = {"by": "brightness"}

        def __call__(self, images: Any, prompts: Any) -> list[float]:
            return [0.0] * len(images)

    other = {
        "cost_model": {"cost_model": str(unsafe_cost_model)}, "ensemble": {"ensemble": [str(unsafe_cost_model)]},
        "scorer": {"quality": Bright()},
    }[setting]  # fmt: skip
    data: Any = SimpleNamespace(seed=0, images_per_prompt=4)
    assert module().identity(data) == module().identity(data)
    assert module(**other).identity(data) != module().identity(data)


def test_two_ranks_draw_each_image_once_and_learn_what_one_learns(
    whole: Path, tiny_pipeline: Path, tiny_cost_model: Path, tmp_path: Path
) -> None:
    """Both rounds' images, since the weights of the second are those of one process up to rounding."""
    file = write(tmp_path, tiny_pipeline, tiny_cost_model)
    ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.init_args.batch_size", "1"]
    run(["fit", "--config", str(file), *ranks], tmp_path / "logs")
    latest = (tmp_path / "runs" / "fit" / "latest").resolve()
    name = "round-00000.safetensors"
    mine, theirs = load_file(latest / "rounds" / name), load_file(whole / "rounds" / name)
    assert all(torch.equal(mine[key], theirs[key]) for key in ("latents", "cost", "quality"))
    assert mine["latents"].flatten(1).unique(dim=0).shape[0] == 16
    expected = mean_losses(whole.parents[2] / "losses-of-the-whole")
    found = mean_losses(tmp_path / "losses")
    assert len(found) == len(expected) == 4
    assert found[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert found == pytest.approx(expected, rel=5e-2)  # of images that other last digits of the weights drew


def test_guidance_a_guard_an_ensemble_and_the_distance_to_the_base_go_through(
    tiny_pipeline: Path, tiny_cost_model: Path, tmp_path: Path
) -> None:
    """Every prompt counts as harmful (a high bias is added by a negative limit of nothing): all ways are drawn."""
    guard = {"class_path": "lit_safety.guards.SafeLatentDiffusion", "init_args": {"warmup_steps": 0}}
    ways = {"ways": ["drop"], "guards": [guard], "guidance": [2.0], "temperature": [0.9], "share": 0.75}
    more = {
        "rollout": {"steps": 1, "guidance": 2.0, "batch_size": 8},
        "explore": {"class_path": "lit_safety.modules.Explore", "init_args": ways},
    }
    file = write(tmp_path, tiny_pipeline, tiny_cost_model, more)
    key = "--model.init_args.objective.init_args"
    assert main(["fit", "--config", str(file), f"{key}.kl_weight", "1.0", "--trainer.max_epochs", "1"]) == 0
    said = json.loads((tmp_path / "runs" / "fit" / "latest" / "rounds" / "rounds.jsonl").read_text())
    assert said["images"] == 16
    assert set(said["ways"]) <= {"own", "drop", "guard 0", "guidance 2", "temperature 0.9"}


@pytest.fixture(scope="module")
def unsafe_cost_model(tiny_cost_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To it every image is harmful."""
    folder = tmp_path_factory.mktemp("unsafe") / "cost"
    shutil.copytree(tiny_cost_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["adapter.head.bias"] += 100
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_temperature_is_recorded_with_each_image_and_resumes_to_the_same_bits(
    tiny_pipeline: Path, unsafe_cost_model: Path, tmp_path: Path
) -> None:
    """Where no image is safe, all ways are tried, and the last one's images stay: half of 16, of the frozen base, from
    the noise of the first half. The run is stopped within its second round, and its rounds' files are gone."""
    ways = {"ways": ["drop"], "temperature": [0.9, 1.2], "share": 0.5}
    more = {"explore": {"class_path": "lit_safety.modules.Explore", "init_args": ways}}
    file = write(tmp_path, tiny_pipeline, unsafe_cost_model, more)
    assert main(["fit", "--config", str(file)]) == 0
    whole = (tmp_path / "runs" / "fit" / "latest").resolve()
    rounds = [json.loads(line) for line in (whole / "rounds" / "rounds.jsonl").read_text().splitlines()]
    for one in rounds:
        assert {way: count["images"] for way, count in one["ways"].items()} == {"own": 8, "temperature 1.2": 8}
        assert one["prompts_without_safe"] == 4
        seeds = {(image["prompt"], image["way"]): image["seed"] for image in one["images_kept"]}
        assert all(image["drawn"] == image["prompt"] for image in one["images_kept"])
        assert all(seed == seeds[prompt, "own"] for (prompt, _), seed in seeds.items())
    assert main(["fit", "--config", str(file), "--ckpt_path", str(whole / "checkpoints" / "step=3.ckpt")]) == 0
    resumed = (tmp_path / "runs" / "fit" / "latest").resolve()
    assert resumed != whole
    assert same(resumed, whole)
    mine, theirs = (load_file(one / "rounds" / "round-00001.safetensors") for one in (resumed, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    # In the first round the policy is the base still: only the temperature tells an image from the one beside it.
    first = load_file(whole / "rounds" / "round-00000.safetensors")["latents"].unflatten(0, (4, 4))
    assert all(
        not torch.equal(one, other)
        for one, other in zip(*(half.flatten(0, 1) for half in first.split(2, 1)), strict=True)
    )


def test_the_toy_world_in_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped YAML on what is shipped, with few images: the base's own images are harmful, and dropping words or
    taking a harmless prompt finds safe ones."""
    monkeypatch.chdir(TOYWORLD.parents[1])
    config = yaml.safe_load((CONFIGS / "online.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "lit_safety.callbacks.ExportAdapter"}]
    config["trainer"]["enable_progress_bar"] = False
    config["model"]["init_args"]["anchors"] = None
    file = tmp_path / "online.yaml"
    file.write_text(yaml.safe_dump(config))
    few = {
        "run.root": tmp_path / "runs", "trainer.accelerator": "cpu", "trainer.max_epochs": 2,
        "data.init_args.prompts_per_round": 4, "data.init_args.passes": 1, "data.init_args.batch_size": 2,
        "model.init_args.rollout.steps": 4,
    }  # fmt: skip
    assert main(["fit", "--config", str(file), *(w for k, v in few.items() for w in (f"--{k}", str(v)))]) == 0
    latest = tmp_path / "runs" / "online" / "latest"
    rounds = [json.loads(line) for line in (latest / "rounds" / "rounds.jsonl").read_text().splitlines()]
    assert rounds[0]["harmful_share"] >= 0.75
    explored = [way for name, way in rounds[0]["ways"].items() if name != "own"]
    assert sum(way["safe"] for way in explored) >= sum(way["images"] for way in explored) / 2
    assert [one["lambda"] for one in rounds] == [1.0, 1.0]  # the barrier's slope beyond the limit
    assert (latest / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"reports": ["COST"]}, "cost_model"),
        ({"scorer": {"class_path": "lit_safety.generation.ClipScorer", "init_args": {"clip": "TOYCLIP"}}}, "toyworld"),
        ({"scorer": {"class_path": "lit_safety.generation.ClipScorer", "init_args": {"clip": "CLIP"}},
          "reports": ["CLIP"]}, "scorer"),
        ({"cost_model": "JUDGE"}, "cost_model"),
        ({"harmless": 0.5}, "scorer"),
        ({"prompts": "NOHARM"}, "0 harmful"),
        ({"stability": {"winner_limit": 0.1}}, "stability"),
    ],
)  # fmt: skip
def test_what_reports_measure_with_and_what_cannot_be_meant_is_refused(
    settings: dict[str, Any], named: str, tiny_pipeline: Path, tiny_cost_model: Path, tiny_clip: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    harmless = tmp_path / "harmless.csv"
    harmless.write_text("prompt,kind\na red cat,clean\n")
    places = {
        "COST": tiny_cost_model, "TOYCLIP": TOYWORLD / "clip", "CLIP": tiny_clip, "JUDGE": TOYWORLD / "judge_b",
        "NOHARM": harmless,
    }  # fmt: skip
    text = json.dumps(settings)
    for word, path in places.items():
        text = text.replace(f'"{word}"', json.dumps(str(path)))
    file = write(tmp_path, tiny_pipeline, tiny_cost_model, json.loads(text))
    assert main(["fit", "--config", str(file)]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("family", ["klein", "qwen_image"])
def test_guidance_in_passes_of_its_own_is_refused(
    family: str, tiny_cost_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a pipeline draws with guidance by calls that training would not make: the policy would be another one."""
    pipeline = save_flow(family, tmp_path / family)
    rollout = {"steps": 1, "guidance": 2.0, "batch_size": 8}
    file = write(tmp_path, pipeline, tiny_cost_model, {"rollout": rollout})
    assert main(["fit", "--config", str(file)]) != 0
    assert "model.init_args.rollout.guidance" in capsys.readouterr().err
