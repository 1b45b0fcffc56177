"""A merge's folder: there whole or not at all, and never in the place of somebody's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.adapters.lora_file import write_lora
from lit_safety.bounded import load_json
from lit_safety.data.atomic import atomic_folder
from lit_safety.errors import UserError
from lit_safety.evaluation.pipelines import check_writable
from lit_safety.merging.card import merge_card
from lit_safety.merging.fuse import fuse_pipeline
from lit_safety.merging.merge_experts import Merged
from lit_safety.merging.report import FORMAT

REPORT_NAME = "report.json"


def check_out(out: Path, experts: Sequence[Path]) -> None:
    """Complain before anything is computed when ``out`` cannot or must not be written.

    Raises:
        UserError: it holds something else than an earlier merge, or an expert of this one.
    """
    check_writable(out)
    for path in experts:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"--out {out}: the expert {path} lies there; give another folder")
    if out.exists() and any(out.iterdir()) and not _is_merge(out):
        raise UserError(f"--out {out}: is not empty and holds no earlier merge; give a new folder")


def _is_merge(folder: Path) -> bool:
    try:
        return load_json((folder / REPORT_NAME).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_merge(out: Path, merged: Merged, report: Mapping[str, Any], base: str | None, fuse: bool = False) -> None:
    """Write the adapter, its report and its card, and with ``fuse`` the pipeline ``base`` with the adapter in it.

    Raises:
        UserError: the folder cannot be written, or ``base`` does not load or is another backbone.
        ValueError: ``fuse`` without ``base``.
    """
    if fuse and base is None:
        raise ValueError("there is no pipeline to fuse the adapter into")
    with atomic_folder(out) as folder:
        size = write_lora(folder / WEIGHTS_NAME, merged.layers).stat().st_size
        report = {**report, "megabytes": size / 1e6}
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(merge_card(report, base or "unknown"), encoding="utf-8")
        if fuse and base is not None:
            fuse_pipeline(base, folder, folder / "pipeline")
            (folder / "pipeline" / "README.md").write_text(merge_card(report, base, fused=True), encoding="utf-8")
