"""Writing a merge: its README.md, its folder, and the pipeline into which it is fused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_safety.adapters.load_lora import fuse_loras, load_lora
from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.adapters.lora_file import write_lora
from lit_safety.backbones.parts import Parts
from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_folder
from lit_safety.core.text import load_json
from lit_safety.drawing.pipelines import check_writable, local_pipeline
from lit_safety.merging.merge_experts import FORMAT, Merged
from lit_safety.report.card import WARNING, Card, Section, card_text, code, settings


def merge_card(report: Mapping[str, Any], base: str, fused: bool = False) -> str:
    """The card as Markdown with the hub's front matter, from the content of `report.json`."""
    experts = [
        (name, f"{report['recipe']['weights'][name]:g}", ", ".join(map(str, e["ranks"])), e["layers"])
        for name, e in report["experts"].items()
    ]
    if fused:
        load = 'DiffusionPipeline.from_pretrained("THIS_FOLDER")'
        what = f"{code(base)} with merged safety experts fused into its weights."
    else:
        load = 'pipe.load_lora_weights("THIS_FOLDER")'
        what = f"Safety experts for {code(base)}, each trained on one category of harm, merged into one LoRA."
    note = (
        f"Merged in delta space; relative Frobenius residual of the written update: {report['residual']:.3g}. Every "
        "layer's residual and the sha256 of every expert are in `report.json`. No image was judged during the merge: "
        "measure it with `python -m lit_safety evaluate`."
    )
    return card_text(
        Card(
            "Merged safety experts",
            f"{what} Load it with\n\n    {load}\n\n{WARNING}",
            [
                Section("Experts", head=("expert", "weight", "rank", "layers"), rows=experts),
                settings(_settings(report), "Merge", note=note),
            ],
            base,
            ["text-to-image", "safety"] if fused else ["lora", "text-to-image", "safety", "merge"],
        )
    )


def _settings(report: Mapping[str, Any]) -> dict[str, Any]:
    recipe = report["recipe"]
    used = {
        "regmean": ("mu", "epsilon"),
        "ties": ("density",),
        "dare": ("drop", "seed"),
        "comerge": ("unit", "statistic", "normalise"),
    }.get(recipe["method"], ())
    used += tuple(key for key in ("null_space", "svc") if recipe[key])
    shown = {"method": recipe["method"], **{key: recipe[key] for key in used}, "scale": recipe["scale"]}
    shown["rank"] = recipe["rank"] or "as needed"
    for key, value in (report["calibration"] or {}).items():
        shown[f"calibration {key}"] = value
    return shown


# Fusing an adapter into a pipeline's weights and writing the whole pipeline, only with stock diffusers.


def fuse_pipeline(pipeline: str, adapter: Path, out: Path) -> None:
    """Write ``pipeline`` with ``adapter`` in its weights to ``out``; it keeps its safety checker.

    It is written in fp32, because half precision could lose a small update.

    Raises:
        UserError: the pipeline does not load, or the adapter was made for another backbone.
    """
    pipe = Parts(str(local_pipeline(pipeline))).pipeline(safety_checker=True)
    load_lora(pipe, adapter)
    fuse_loras(pipe, safe_fusing=True)
    pipe.unload_lora_weights()
    pipe.save_pretrained(out)


# A merge's folder: it is written completely or not at all, and never replaces a user's own files.


REPORT_NAME = "report.json"
CURVE_NAME = "tuning.png"


def check_out(out: Path, experts: Sequence[Path]) -> None:
    """Before anything is computed, refuse an ``out`` that cannot or must not be written.

    Raises:
        UserError: it holds something else than an earlier merge, or an expert of this merge.
    """
    check_writable(out)
    for path in experts:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"--out {out}: contains the expert {path}; give another folder")
    if out.exists() and any(out.iterdir()) and not _is_merge(out):
        raise UserError(f"--out {out}: is not empty and is not an earlier merge; give a new folder")


def _is_merge(folder: Path) -> bool:
    try:
        return bool(load_json((folder / REPORT_NAME).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_merge(
    out: Path,
    merged: Merged,
    report: Mapping[str, Any],
    base: str | None,
    fuse: bool = False,
    others: Mapping[str, tuple[Merged, Mapping[str, Any]]] | None = None,
    curve: bytes | None = None,
    statistics: Path | None = None,
) -> None:
    """Write the adapter, its report and its card, and with ``fuse`` the pipeline ``base`` with the adapter in it.

    Args:
        out: the folder; it is written completely or not at all.
        merged: the merge to write.
        report: the content of `report.json`, without the file's size.
        base: the base model; None: unknown.
        fuse: also write the pipeline.
        others: further adapters with their reports, by the names of their folders in ``out``.
        curve: the PNG file that shows the choice of mu.
        statistics: a folder that is moved into ``out``.

    Raises:
        UserError: the folder cannot be written, or ``base`` does not load or is another backbone.
        ValueError: ``fuse`` without ``base``.
    """
    if fuse and base is None:
        raise ValueError("no pipeline is given to fuse the adapter into")
    with atomic_folder(out) as folder:
        report = _write(folder, merged, report, base)
        for name, (other, its) in (others or {}).items():
            (folder / name).mkdir()
            _write(folder / name, other, its, base)
        if curve is not None:
            (folder / CURVE_NAME).write_bytes(curve)
        if statistics is not None:
            shutil.move(statistics, folder / statistics.name)
        if fuse and base is not None:
            fuse_pipeline(base, folder, folder / "pipeline")
            (folder / "pipeline" / "README.md").write_text(merge_card(report, base, fused=True), encoding="utf-8")


def _write(folder: Path, merged: Merged, report: Mapping[str, Any], base: str | None) -> Mapping[str, Any]:
    size = write_lora(folder / WEIGHTS_NAME, merged.layers).stat().st_size
    report = {**report, "megabytes": size / 1e6}
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(merge_card(report, base or "unknown"), encoding="utf-8")
    return report
