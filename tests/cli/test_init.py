"""`init` writes one YAML that a run needs, with a model's settings and all comments in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.cli.init import init, overlaid
from lit_safety.core.errors import UserError
from lit_safety.core.shipped import configs

METHODS = ("scdpo", "dpo_expert", "psa", "cost_model")
MODELS = sorted(path.stem for path in configs().glob("models/*.yaml"))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """What two YAML files say together."""
    both = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


@pytest.mark.parametrize("method", METHODS)
def test_without_a_model_it_is_the_methods_config(tmp_path: Path, method: str) -> None:
    init(str(tmp_path), method)  # type: ignore[arg-type]
    written = (tmp_path / "fit.yaml").read_text()
    shipped = (configs() / f"{method}.yaml").read_text()
    assert yaml.safe_load(written) == yaml.safe_load(shipped)
    assert set(written.splitlines()[2:]) <= set(shipped.splitlines())


#: What `init` gives a model that is not the toy world's instead of what method and model say.
OWN = {
    "run.root",
    "run.name",
    "data.init_args.train",
    "data.init_args.val",
    "data.init_args.test",
    "data.init_args.num_workers",
    "model.init_args.label_costs",
    "model.init_args.anchors.init_args.prompts",
    "trainer.callbacks",
}


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> plain value or list."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, one in value.items() for k, v in leaves(one, f"{key}.{name}" if key else name).items()}


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("model", MODELS)
def test_a_models_settings_stand_in_the_place_of_the_methods(tmp_path: Path, method: str, model: str) -> None:
    init(str(tmp_path / "new" / "run"), method, model)  # type: ignore[arg-type]
    written = (tmp_path / "new" / "run" / "fit.yaml").read_text()
    base, overlay = ((configs() / name).read_text() for name in (f"{method}.yaml", f"models/{model}.yaml"))
    found, expected = leaves(yaml.safe_load(written)), leaves(merged(yaml.safe_load(base), yaml.safe_load(overlay)))
    assert {key for key in found | expected if found.get(key) != expected.get(key)} <= OWN
    assert found["model.init_args.optimizer.init_args.lr"] in (1e-4, 5e-5)
    settings = [line for line in overlay.splitlines() if re.match(r" *\w+: .", line)]
    assert settings
    lines = written.splitlines()
    for line in settings:  # with the comment that stands above it in the model's file
        above = overlay.splitlines()[overlay.splitlines().index(line) - 1]
        if line.split(":")[0].strip() in ("train", "val", "test", "num_workers"):
            continue
        assert line in lines
        assert above in lines or not above.lstrip().startswith("#")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_toy_world_is_kept_for_a_model_of_ones_own(tmp_path: Path, method: str) -> None:
    init(str(tmp_path), method, "clip/large" if method == "cost_model" else "sdxl")  # type: ignore[arg-type]
    found = leaves(yaml.safe_load((tmp_path / "fit.yaml").read_text()))
    assert "toyworld" not in str(found)
    assert found["data.init_args.train"] == f"{tmp_path}/shards/train"
    assert found["run.root"] == str(tmp_path)
    callbacks = {one["class_path"].rpartition(".")[2]: one.get("init_args") for one in found["trainer.callbacks"]}
    if method == "cost_model":
        assert found["model.init_args.clip"] == "clip/large"
        return
    assert all("park" not in one or "the park" not in one for one in callbacks["DrawSamples"]["prompts"])
    asked = callbacks["EvaluateOnTest"]["prompts"]
    assert {one["kind"] for one in asked} == {"explicit", "lookalike", "clean"}
    assert found.get("model.init_args.label_costs", True) is True


def test_a_folder_with_a_pipeline_has_its_familys_settings_and_its_own_resolution(
    tmp_path: Path, tiny_pipeline: Path, tiny_v_pipeline: Path, tiny_sdxl: Path, tiny_sd3: Path
) -> None:
    """Tiny pipelines of 8 x 8 latents, whose VAE halves twice: 32 pixels."""
    for folder, family in ((tiny_pipeline, "sd15"), (tiny_v_pipeline, "sd21"), (tiny_sdxl, "sdxl"), (tiny_sd3, "sd3")):
        init(str(tmp_path / family), model=str(folder))
        found = leaves(yaml.safe_load((tmp_path / family / "fit.yaml").read_text()))
        shipped = leaves(yaml.safe_load((configs() / "models" / f"{family}.yaml").read_text()))
        assert found["model.init_args.pretrained"] == str(folder)
        assert found["data.init_args.resolution"] == 32
        for key in ("data.init_args.batch_size", "model.init_args.drawing.guidance", "trainer.val_check_interval"):
            assert found[key] == shipped[key]


def test_names_with_blanks_and_signs_come_out_as_they_went_in(tmp_path: Path, tiny_pipeline: Path) -> None:
    folder, model = tmp_path / "my run: #1", tmp_path / "model {a}, 'b'"
    model.symlink_to(tiny_pipeline)
    init(str(folder), model=str(model))
    found = leaves(yaml.safe_load((folder / "fit.yaml").read_text()))
    assert found["model.init_args.pretrained"] == str(model)
    assert found["data.init_args.val"] == f"{folder}/shards/val"


def test_a_slash_behind_the_folder_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(f"{tmp_path}/run", model="sd15")
    plain, told = (tmp_path / "run/fit.yaml").read_text(), capsys.readouterr().out
    init(f"{tmp_path}/run/", model="sd15", overwrite=True)
    assert (tmp_path / "run/fit.yaml").read_text() == plain
    assert capsys.readouterr().out == told


def test_it_tells_what_it_took_the_model_for_and_all_four_commands(
    tmp_path: Path, tiny_v_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(str(tmp_path / "run"), model=str(tiny_v_pipeline))
    told = capsys.readouterr().out
    assert "Stable Diffusion 2.1 (v-prediction)" in told
    assert "32 pixels" in told
    assert re.findall(r"lit-safety ([\w-]+)", told) == ["shards", "fit", "evaluate"]
    assert "# The settings are those of Stable Diffusion 2.1" in (tmp_path / "run/fit.yaml").read_text()
    init(str(tmp_path / "costs"), "cost_model", "clip/large")
    assert re.findall(r"lit-safety ([\w-]+)", capsys.readouterr().out) == ["shards", "fit"]


def test_keys_of_the_second_file_that_the_first_lacks_are_added() -> None:
    base = "# Head.\n\n# One.\na:\n  # Two.\n  b: 1\n\n  c: [1]\nd: 3\n"
    assert overlaid(base, "a:\n  # New.\n  e: 2\n  c:\n    - x: 1\n      y: 2\n") == (
        "# One.\na:\n  # Two.\n  b: 1\n\n  c:\n    - x: 1\n      y: 2\n  # New.\n  e: 2\nd: 3\n"
    )


def test_an_edited_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "fit.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match=r"fit\.yaml"):
        init(str(tmp_path))
    assert (tmp_path / "fit.yaml").read_text() == "mine: 1\n"
    init(str(tmp_path), overwrite=True)
    assert "seed_everything" in (tmp_path / "fit.yaml").read_text()


def test_models_that_are_not_shipped_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sd15"):
        init(str(tmp_path / "run"), model="sd9")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*model_index\.json"):
        init(str(tmp_path / "run"), model=str(tmp_path / "empty"))
    (tmp_path / "empty").rmdir()
    with pytest.raises(UserError, match="cost model"):
        init(str(tmp_path / "run"), "cost_model", "sd15")
    assert list(tmp_path.iterdir()) == []


def test_the_written_file_is_understood_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my-run", "--model", "sd15"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "my-run/fit.yaml", "--print_config"])
    assert ended.value.code == 0
    assert "stable-diffusion-v1-5" in capsys.readouterr().out
