"""Whole processes in turns: ours (`python -m lit_safety fit`) against two published trainers' steps, offline.

    python benchmarks/peers.py                                            # the toy world, 20 steps of 8 pairs, 2 rounds
    python benchmarks/peers.py --model sd15 --scale small --resolution 128 --batch_size 2

All sides train the same LoRA of rank 4 on the same pairs with Diffusion-DPO and AdamW, in fp32 on a CPU. The peers
(`recipes.py`: diffusers' example of Diffusion-DPO, and SafetyDPO's trainer) read image files and encode images and
words at every step; their processes import torch, diffusers, transformers and peft alone. Ours reads the images, a
cache, or a reference cache. A process is measured from start to end: imports, networks, steps, the written LoRA.
Rounds go over all sides in turns, so that whatever else the machine does slows all of them; ratios are of medians.
Making the caches is stated beside the ratios: it is done once for all runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = ("diffusers example", "SafetyDPO")
OURS = ("images", "cached", "reference cache")
#: What each process writes: the seconds since the epoch at which each of its steps ended.
ENDS = "ends.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("toy", "sd15"), default="toy")
    parser.add_argument("--scale", choices=("small", "quarter", "full"), default="small", help="of the random sd15")
    parser.add_argument("--resolution", type=int, help="pixels; default: 32 for toy, 128 for sd15")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=(*PEERS, *OURS), default=[*PEERS, *OURS])
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the time of a step is from the end of one to the end of the next")
    options.resolution = options.resolution or {"toy": 32, "sd15": 128}[options.model]
    if options.peer is not None:
        train_peer(options.peer, options.work, options.resolution, options.batch_size, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(options, Path(folder)), indent=1))


# ---- all sides, in turns


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    made = prepare(options, work)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            runs[side].append(measured(command(side, options, work), work, options.threads))
    found = {side: {name: statistics.median(run[name] for run in own) for name in own[0]} for side, own in runs.items()}
    table: dict[str, Any] = {}
    for side, own in found.items():
        table[side] = {name: round(value, 4) for name, value in own.items()}
        for peer in PEERS:
            if peer in found and side not in PEERS:
                table[side][f"times as fast as {peer}"] = {
                    name: round(found[peer][name] / value, 3) for name, value in own.items()
                }
    return {
        "model": options.model if options.model == "toy" else f"{options.model}, {options.scale}",
        "pixels": options.resolution,
        "pairs a step": options.batch_size,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "seconds to make the caches, once": made,
        "sides": table,
    }


def prepare(options: argparse.Namespace, work: Path) -> dict[str, float]:
    """The pipeline, shards, caches and image files that the sides read; returns what the caches took."""
    from networks import TOY, random_pairs, random_pipeline

    from lit_safety.cli.precompute import precompute

    shards = TOY / "shards" / "val"
    if options.model == "toy":
        (work / "pipeline").symlink_to(TOY / "pipeline")
    else:
        random_pipeline(work / "pipeline", options.scale)
        shards = random_pairs(work / "pairs", 4 * options.batch_size, options.resolution)
    (work / "images").symlink_to(shards)
    unpack(shards, work / "files")
    taken = {}
    for side in set(options.sides) & set(OURS[1:]):
        draws = {"reference_draws": 4} if side == "reference cache" else {}
        began = time.perf_counter()
        precompute(
            str(shards), str(work / "pipeline"), str(work / side), resolution=options.resolution, device="cpu", **draws
        )
        taken[side] = round(time.perf_counter() - began, 1)
    return taken


def unpack(shards: Path, folder: Path) -> None:
    """The pairs as the peers read them: image files, and a table of prompts."""
    folder.mkdir()
    rows: dict[str, dict[str, str]] = {}
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                if suffix == "json":
                    rows.setdefault(key, {})["prompt"] = json.load(data)["prompt"]
                elif (side := suffix.partition(".")[0]) in ("chosen", "rejected"):
                    (folder / member.name).write_bytes(data.read())
                    rows.setdefault(key, {})[side] = member.name
    (folder / "pairs.json").write_text(json.dumps([one for one in rows.values() if len(one) == 3]), encoding="utf-8")


def command(side: str, options: argparse.Namespace, work: Path) -> list[str]:
    if side in PEERS:
        given = {"work": work, "peer": side, "resolution": options.resolution, "steps": options.steps}
        given |= {"batch_size": options.batch_size, "model": options.model}
        return [
            sys.executable,
            str(HERE / "peers.py"),
            *(str(word) for n, v in given.items() for word in (f"--{n}", v)),
        ]
    from recipes import BETA, RANK, RATE, TARGETS  # torch comes with it

    config = {
        "seed_everything": 0,
        "run": {"root": str(work / "runs"), "name": side.replace(" ", "-")},
        "model": {
            "class_path": "lit_safety.modules.PreferenceModule",
            "init_args": {
                "pretrained": str(work / "pipeline"),
                "objective": {"class_path": "lit_safety.objectives.DiffusionDPO", "init_args": {"beta": BETA}},
                "lora": {
                    "class_path": "lit_safety.adapters.LoRA",
                    "init_args": {"rank": RANK, "target_modules": TARGETS},
                },
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": RATE, "weight_decay": 1e-2, "fused": True},
                },
            },
        },
        "data": {
            "class_path": "lit_safety.data.PreferenceDataModule",
            "init_args": {
                "train": str(work / side),
                "batch_size": options.batch_size,
                "resolution": options.resolution,
            },
        },
        "trainer": {
            "max_steps": options.steps,
            "max_epochs": -1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "fit_clock.StepClock", "init_args": {"file": str(work / ENDS)}}],
        },
    }
    file = work / "config.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return [sys.executable, "-m", "lit_safety", "fit", "--config", str(file)]


def measured(words: list[str], work: Path, threads: int) -> dict[str, float]:
    """One process: seconds as a whole, to the end of its first step, of a later step, and of processor time."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}\n{done.stdout[-4000:]}")
    ends = json.loads((work / ENDS).read_text(encoding="utf-8"))
    (work / ENDS).unlink()
    return {
        "whole process, s": ended - began,
        "first step ended after, s": ends[0] - began,
        "a step, s": statistics.median(later - earlier for earlier, later in itertools.pairwise(ends)),
        "processor time, s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


# ---- a peer's process


def train_peer(peer: str, work: Path, resolution: int, batch_size: int, steps: int) -> None:
    """A peer's trainer: image files and words into its step, at last its LoRA into a file."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from recipes import RANK, TARGETS, Example, Recipe, SafetyDPO
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    pipeline = work / "pipeline"

    def load(kind: Any, name: str) -> Any:
        return kind.from_pretrained(pipeline, subfolder=name).requires_grad_(False)

    tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    vae, text, unet = (
        load(AutoencoderKL, "vae"),
        load(CLIPTextModel, "text_encoder"),
        load(UNet2DConditionModel, "unet"),
    )
    second = load(UNet2DConditionModel, "unet") if peer == "SafetyDPO" else None
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    schedule = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    kind: type[Recipe] = Example if peer == "diffusers example" else SafetyDPO
    parameters = [one for one in unet.parameters() if one.requires_grad]
    recipe = kind(vae, [text], unet.train(), schedule, parameters, second)
    ends = []
    for images, tokens in itertools.islice(batches(work / "files", tokenizer, resolution, batch_size), steps):
        recipe.train(images, tokens)
        ends.append(time.time())
    save_file(get_peft_model_state_dict(unet), work / f"{peer}.safetensors")
    (work / ENDS).write_text(json.dumps(ends), encoding="utf-8")


def batches(folder: Path, tokenizer: Any, resolution: int, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Images (2B, 3, H, W) in [-1, 1], chosen then rejected, and tokens (B, L), in shuffled passes without end."""
    import numpy as np
    import torch
    from PIL import Image

    rows = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))

    def pixels(name: str) -> Any:
        image = Image.open(folder / name).convert("RGB")
        if image.size != (resolution, resolution):
            image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    while True:
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            taken = [rows[place] for place in order[start : start + batch_size]]
            images = torch.stack([pixels(one[side]) for side in ("chosen", "rejected") for one in taken])
            words = tokenizer(
                [one["prompt"] for one in taken],
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
            yield images, words.input_ids


if __name__ == "__main__":
    main()
