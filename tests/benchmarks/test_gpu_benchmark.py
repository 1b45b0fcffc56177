"""The script for a GPU, in its tiny form on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.documents import ROOT


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_the_tiny_form_measures_every_cell(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert set(cells) == {cell.name for cell in gpu.TINY}
    assert {cell["model"] for cell in cells.values()} == {"sd15", "sd35"}
    for name, cell in cells.items():
        assert cell["pairs/s"] > 0, name
        assert cell["steps"] >= 3
        assert cell["TFLOP/s"] > 0
        assert 0 <= cell["idle, %"] <= 100
    published, cached, reference = (cells[f"sd15, {arm}, batch 2"] for arm in ("published", "cached", "reference"))
    assert published["times the published recipe"] == 1
    assert published["TFLOP a pair"] > cached["TFLOP a pair"] > 1.3 * reference["TFLOP a pair"]
    assert set(found["commands"]["evaluate"]["seconds"]) == {"2", "6"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in cells)


def test_cells_are_as_many_as_the_time_allows(gpu: Any):
    assert len(gpu.CELLS) == 12
    assert len(gpu.QUICK) == 6
    assert len({cell.name for cell in gpu.CELLS}) == 12
    assert set(gpu.QUICK) < set(gpu.CELLS)
    assert {cell.arm for cell in gpu.TINY} == {cell.arm for cell in gpu.CELLS}


def test_what_no_time_is_left_for_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        gpu, "commands", lambda form, device: {n: {"images/s": None} for n in ("precompute", "evaluate")}
    )
    form = gpu.Form(gpu.TINY[:1], seconds=-1.0, each=0.1, images=(2, 6))
    found = gpu.measure(form, gpu.torch.device("cpu"))
    assert "time" in found["cells"][0]["left out"]
    assert "no time" in gpu.table(found)


def test_a_gpu_is_idle_where_no_kernel_of_any_stream_runs(gpu: Any):
    assert gpu.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert gpu.covered([]) == 0


def test_true_sizes_are_refused_on_a_cpu(gpu: Any):
    with pytest.raises(SystemExit):
        gpu.main(["--quick", "--device", "cpu"])
