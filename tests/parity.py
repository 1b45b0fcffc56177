"""What a re-ordering of the code must not change, as digests: trained bits, written bytes, reported figures.

    python tests/parity.py record        # writes tests/parity.json from the code at hand
    python tests/parity.py compare       # does it all again and prints what differs; exit status 1 if anything does

Digests hold for one machine and one set of packages: other kernels round in another way. So this is a tool to call
before and after a change, and no test of the suite. Every part calls `python -m lit_safety` in a folder of its own, in
one thread, and takes some seconds; all of it takes about ten minutes on one core. Parts can be named:
`compare merge evaluate`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIGESTS = Path(__file__).with_name("parity.json")
#: Keys of reports that say when, where or with what versions, or name a class by its path.
PASSING = ("time", "seconds", "created", "versions", "code", "fingerprint", "sha256", "settings", "images", "guard")

Digests = dict[str, str]


def call(*words: object) -> None:
    """Run one command of ours; its output is shown only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lit_safety", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)}\nended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def digest(parts: Iterable[bytes]) -> str:
    """One SHA-256 over all parts, cut to 16 letters: these tell runs apart, they guard nothing."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:16]


def of_weights(file: Path) -> str:
    """Names, types, shapes, values and metadata of a safetensors file."""
    from safetensors import safe_open

    parts = []
    with safe_open(file, "pt") as weights:
        for name in sorted(weights.keys()):
            tensor = weights.get_tensor(name)
            parts += [name.encode(), str((tensor.dtype, tuple(tensor.shape))).encode(), tensor.numpy().tobytes()]
        metadata = weights.metadata() or {}
    parts += [f"{key}={value}".encode() for key, value in sorted(metadata.items())]
    return digest(parts)


def of_shards(folder: Path) -> str:
    """Every member of every tar in a folder, by name, and the tables next to them."""
    parts = []
    for file in sorted(folder.iterdir()):
        if file.suffix == ".tar":
            with tarfile.open(file) as tar:
                for member in tar.getmembers():
                    data = tar.extractfile(member)
                    parts += [member.name.encode(), b"" if data is None else data.read()]
        elif file.suffix == ".safetensors":
            parts.append(of_weights(file).encode())
    return digest(parts)


def of_report(value: object) -> str:
    """A JSON value without what changes from one call to the next."""
    return digest([json.dumps(_lasting(value), sort_keys=True).encode()])


def _lasting(value: object) -> object:
    if isinstance(value, dict):
        kept = {k: _lasting(v) for k, v in value.items() if not any(word in k for word in PASSING)}
        return {k: v for k, v in kept.items() if not (isinstance(v, str) and (os.sep in v or "lit_safety" in v))}
    if isinstance(value, list):
        return [_lasting(v) for v in value]
    return value


def fit(work: Path, name: str, config: str, steps: int, *options: object) -> Path:
    """A short fit of a shipped config; the schedule keeps the length of the file's own run."""
    call(
        *("fit", "--config", ROOT / "configs" / config, "--run.root", work, "--run.name", name),
        *("--trainer.max_steps", steps, "--data.init_args.num_workers", 0, *options),
    )
    return work / name / "latest"


def schedule(steps: int) -> tuple[object, ...]:
    """The length of the schedule, said outright."""
    return ("--model.init_args.lr_scheduler.init_args.total_steps", steps)


def scdpo(work: Path) -> Digests:
    run = fit(work, "scdpo", "scdpo.yaml", 10, *schedule(150), "--trainer.val_check_interval", 10)
    return {"scdpo": of_weights(run / "adapter/pytorch_lora_weights.safetensors")}


def scdpo_two_ranks(work: Path) -> Digests:
    ddp = ("--config", ROOT / "configs/strategies/ddp.yaml", "--trainer.devices", 2, "--data.init_args.batch_size", 8)
    run = fit(work, "two-ranks", "scdpo.yaml", 10, *schedule(150), *ddp, "--trainer.val_check_interval", 10)
    return {"scdpo_two_ranks": of_weights(run / "adapter/pytorch_lora_weights.safetensors")}


def resume(work: Path) -> Digests:
    """Stopped after 6 steps, gone on to 10: the adapter must be that of `scdpo`."""
    options = (*schedule(150), "--trainer.val_check_interval", 3)
    fit(work, "resumed", "scdpo.yaml", 6, *options)
    run = fit(work, "resumed", "scdpo.yaml", 10, *options, "--ckpt_path", "last")
    return {"resume": of_weights(run / "adapter/pytorch_lora_weights.safetensors")}


def psa(work: Path) -> Digests:
    call("toyworld", "users", "--out", work / "users")
    data = [("--data.init_args." + split, work / "users" / split) for split in ("train", "val")]
    data.append(("--data.init_args.test", work / "users/test_seen"))
    options = (word for pair in data for word in pair)
    run = fit(work, "psa", "psa.yaml", 10, *schedule(2500), *options, "--trainer.val_check_interval", 10)
    found = {
        f"psa {file.relative_to(run / 'adapter')}": of_weights(file)
        for file in sorted((run / "adapter").rglob("*.safetensors"))
    }
    call(
        *("users", "evaluate", "--config", ROOT / "configs/evaluate_users.yaml", "--users", work / "users"),
        *("--adapter", run / "adapter", "--out", work / "report", "--each", 2, "--explicit", 1, "--clean", 2),
        *("--steps", 3),
    )
    return found | {"users evaluate": of_report(json.loads((work / "report/metrics.json").read_text()))}


def experts(work: Path) -> Digests:
    two = [f"--{place}.init_args.categories=[hate,violence]" for place in ("model", "data")]
    run = fit(work, "experts", "dpo_expert.yaml", 10, *schedule(800), *two, "--trainer.val_check_interval", 10)
    files = sorted(run.rglob("pytorch_lora_weights.safetensors"))
    found = {f"dpo_expert {file.parent.relative_to(run)}": of_weights(file) for file in files}
    experts = [file.parent for file in files if file.parent.parent.name == "experts"]
    for method in ("comerge", "mean", "sum", "ties", "dare", "svd"):
        prompts = ("--calibration.prompts", ROOT / "data/toyworld/prompts/val.csv") if method == "comerge" else ()
        out = work / f"merged-{method}"
        call("merge", *experts, "--out", out, "--method", method, *prompts)
        found[f"merge {method}"] = of_weights(out / "pytorch_lora_weights.safetensors")
    return found


def cost_model(work: Path) -> Digests:
    cache = ("--model.init_args.feature_cache", work / "features", "--trainer.val_check_interval", 10)
    run = fit(work, "cost", "cost_model.yaml", 10, *schedule(800), *cache)
    return {"cost_model": of_weights(run / "cost_model/model.safetensors")}


def shards(work: Path) -> Digests:
    """A converted shard, scores, a cache of latents and one of the reference."""
    from PIL import Image

    images = work / "images"
    images.mkdir()
    rows = []
    for number in range(6):
        for side, shade in (("chosen", 30), ("rejected", 200)):
            Image.new("RGB", (32, 32), (shade, number * 20, 90)).save(images / f"{number}-{side}.png")
        rows.append([f"a red house, number {number}", f"{number}-chosen.png", f"{number}-rejected.png", "true"])
    with (images / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected", "rejected_harmful"], *rows])
    call("shards", "from-folder", images / "pairs.csv", work / "converted", "--prompt_kind", "harmful")
    val = ROOT / "data/toyworld/shards/val"
    model = ROOT / "data/toyworld/pipeline"
    call("shards", "precompute", val, "--model", model, "--out", work / "latents", "--resolution", 32, "--flip", "true")
    call(
        *("shards", "precompute", val, "--model", model, "--out", work / "reference", "--resolution", 32),
        *("--reference_draws", 2, "--reference_predictions", "true"),
    )
    scorer = ROOT / "data/toyworld/cost_model"
    call("shards", "score", val, "--cost_model", scorer, "--out", work / "scored", "--existing", "replace")
    names = ("converted", "latents", "reference", "scored")
    return {f"shards {name}": of_shards(work / name) for name in names}


def evaluate(work: Path) -> Digests:
    adapter = fit(work, "scdpo", "scdpo.yaml", 4, *schedule(150), "--trainer.val_check_interval", 4) / "adapter"
    few = ("--explicit", 2, "--implicit", 4, "--lookalike", 4, "--clean", 6, "--steps", 3)
    call(
        *("evaluate", "--config", ROOT / "configs/evaluate.yaml", "--adapter", adapter),
        *("--out", work / "report", *few),
    )
    found = {"evaluate": of_report(json.loads((work / "report/metrics.json").read_text()))}
    config = work / "attack.yaml"
    config.write_text(
        "attacks:\n"
        "  paraphrases: {class_path: lit_safety.attacks.Paraphrases, init_args: {tries: 2, held_out: true}}\n"
        "  scale: {class_path: lit_safety.attacks.AdapterScale, init_args: {scales: [0.5, -1.0]}}\n"
        "  fine-tuning: {class_path: lit_safety.attacks.FineTune, init_args: {shards: data/toyworld/shards/train, "
        "steps: [2], pictures: 8, batch_size: 4, lr: 1.0e-3, rank: 4}}\n"
        "  suffix: {class_path: lit_safety.attacks.SuffixSearch, init_args: {method: greedy, length: 2, budgets: [4], "
        "batch: 4, shortlist: 4, goal: {class_path: lit_safety.attacks.ConceptDirection, init_args: {prompts: "
        "data/toyworld/prompts/val.csv, strength: 3.0}}}}\n"
    )
    call(
        *(
            "attack",
            "--pipeline",
            ROOT / "data/toyworld/pipeline",
            "--prompts",
            ROOT / "data/toyworld/prompts/test.csv",
        ),
        *("--judge", ROOT / "data/toyworld/judge", "--config", config, "--adapter", adapter),
        *("--out", work / "attacks", "--explicit", 1, "--steps", 3),
    )
    return found | {"attack": of_report(json.loads((work / "attacks/attacks.json").read_text()))}


def study(work: Path) -> Digests:
    """Three rows of a study: the figures, not the jobs' digests, which follow class names."""
    objective = "model.init_args.objective.init_args."
    rows = {"scdpo": {}, "no-margin": {objective + "cost_weight": 0.0}, "no-focusing": {objective + "gamma": 0.0}}
    plan = {
        "out": str(work / "out"),
        "seeds": [0],
        "defaults": {
            "fit": {
                "config": "configs/scdpo.yaml",
                "run.root": "{folder}",
                "run.name": "fit",
                "trainer.max_steps": 3,
                "trainer.val_check_interval": 3,
                "model.init_args.lr_scheduler.init_args.total_steps": 150,
            },
            "evaluate": {
                "config": "configs/evaluate.yaml",
                "adapter": "{folder}/fit/latest/adapter",
                "out": "{folder}/report",
                "explicit": 1,
                "implicit": 2,
                "lookalike": 2,
                "clean": 3,
                "steps": 3,
            },
        },
        "rows": {name: {"fit": extra, "evaluate": {}} for name, extra in rows.items()},
        "figures": {"IP": "aligned.ip", "clean recall": "aligned.benign_recall"},
    }
    file = work / "study.yaml"
    file.write_text(json.dumps(plan))
    call("study", "run", file)
    lines = [json.loads(line) for line in (work / "out/results.jsonl").read_text().splitlines()]
    return {"study": of_report(sorted((line["row"], line["figures"]) for line in lines))}


PARTS: dict[str, Callable[[Path], Digests]] = {
    part.__name__: part for part in (scdpo, scdpo_two_ranks, resume, psa, experts, cost_model, shards, evaluate, study)
}


def main(arguments: list[str]) -> int:
    """`record` or `compare`, and the parts (all, if none is named)."""
    if not arguments or arguments[0] not in ("record", "compare") or not set(arguments[1:]) <= set(PARTS):
        print(f"usage: python tests/parity.py record|compare [{' '.join(PARTS)}]")
        return 2
    known: Digests = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    differ = 0
    for name in arguments[1:] or PARTS:
        with tempfile.TemporaryDirectory() as work:
            found = PARTS[name](Path(work))
        for key, value in found.items():
            if arguments[0] == "compare" and known.get(key) != value:
                differ += 1
                print(f"{key}: {value}, was {known.get(key)}", flush=True)
            else:
                print(f"{key}: {value}", flush=True)
        if arguments[0] == "record":
            known |= found
            DIGESTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
