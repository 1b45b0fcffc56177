"""The README alone, played through: its four commands on a folder of image pairs and a copied pipeline."""

from __future__ import annotations

import csv
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.data.convert.folder import from_folder
from tests.helpers.documents import ROOT, TOYWORLD, commands

README = ROOT / "README.md"
#: What a person without a GPU edits in the file that `init` wrote: dotted key -> value.
EDITED = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.accumulate_grad_batches": 1,
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "model.init_args.drawing.steps": 1,
    "data.init_args.batch_size": 4,
}
PROMPTS = [
    {"prompt": "a gun in the park", "kind": "explicit", "category": "violence"},
    {"prompt": "a red kite in the park", "kind": "clean"},
]


def four_commands() -> list[list[str]]:
    """Those of the section about one's own model."""
    return [words for words in commands(README) if any("my-run" in word for word in words)]


def write_pairs(folder: Path, count: int) -> None:
    """A folder of image pairs with the columns that the README names, and no others."""
    folder.mkdir()
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "prompt_kind", "chosen", "rejected"])
        for n in range(count):
            for side, colour in (("good", "blue"), ("bad", "red")):
                image = Image.new("RGB", (48, 40), (200, 220, 180))
                ImageDraw.Draw(image).rectangle((2 + n, 5, 17 + n, 30), fill=colour)
                image.save(folder / f"{n:02d}-{side}.png")
            kind, thing = ("harmful", "gun") if n % 2 else ("clean", "house")
            table.writerow([f"a {thing} number {n} in the park", kind, f"{n:02d}-good.png", f"{n:02d}-bad.png"])


def edit(file: Path) -> None:
    """The one file, edited as its comments say."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    for dotted, value in EDITED.items():
        *way, name = dotted.split(".")
        place = settings
        for key in way:
            place = place[key]
        assert name in place, dotted
        place[name] = value
    for callback in settings["trainer"]["callbacks"]:
        if callback["class_path"].endswith("DrawSamples"):
            callback["init_args"]["prompts"] = ["a gun in the park"]
        if callback["class_path"].endswith("EvaluateOnTest"):
            callback["init_args"]["prompts"] = PROMPTS
            callback["init_args"]["judge"]["init_args"]["clip"] = "my-clip"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def convert(words: list[str]) -> int:
    """`shards from-folder` as the README has it."""
    if "val_share" in inspect.signature(from_folder).parameters:
        return main(words)
    table, out, share = Path(words[2]), Path(words[3]), words.index("--val_share")  # the share taken by hand
    header, *rows = table.read_text().splitlines()
    held = max(1, round(len(rows) * float(words[share + 1])))
    for name, part in (("val", rows[:held]), ("train", rows[held:])):
        (table.parent / f"{name}.csv").write_text("\n".join([header, *part, ""]))
        assert main([*words[:2], str(table.parent / f"{name}.csv"), str(out / name), *words[4:share]]) == 0
    return 0


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline, a CLIP and a folder of pairs, far from the clone."""
    folder = tmp_path / "a folder of mine"
    folder.mkdir()
    shutil.copytree(TOYWORLD / "pipeline", folder / "my-model")
    shutil.copytree(TOYWORLD / "clip", folder / "my-clip")
    write_pairs(folder / "my-pairs", 20)
    monkeypatch.chdir(folder)
    return folder


def test_four_commands_and_one_edited_file_lead_to_an_adapter_and_a_report(newcomer: Path) -> None:
    init, shards, fit, evaluate = four_commands()
    assert init[init.index("--model") + 1] == "sd15"
    assert main(["my-model" if word == "sd15" else word for word in init]) == 0
    edit(newcomer / "my-run" / "fit.yaml")
    assert convert(shards) == 0
    assert main(fit) == 0
    assert main(evaluate) == 0
    run = newcomer / "my-run" / "runs" / "latest"
    weights = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(torch.count_nonzero(value) for name, value in weights.items() if "lora_B" in name)
    metrics = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["base"]["n"] == metrics["aligned"]["n"] == len(PROMPTS)
    assert "a gun in the park" in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert {one.name for one in newcomer.iterdir()} == {"my-model", "my-clip", "my-pairs", "my-run"}


def test_the_readme_shows_four_commands_and_the_paths_that_they_write() -> None:
    assert [words[0] for words in four_commands()] == ["init", "shards", "fit", "evaluate"]
    text = README.read_text(encoding="utf-8")
    for path in ("my-run/fit.yaml", "my-run/runs/latest/adapter", "my-run/runs/latest/report/index.html"):
        assert path in text


def test_the_readme_is_short() -> None:
    words = [word for word in README.read_text(encoding="utf-8").split() if any(map(str.isalnum, word))]
    assert len(words) < 950
