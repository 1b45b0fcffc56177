"""The benchmark of a step: its counter against the known operations of the true sizes, and a run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers.documents import ROOT

FOLDER = ROOT / "benchmarks"


def test_reference_errors_of_a_benchmark_stay_true(monkeypatch: pytest.MonkeyPatch):
    """Nothing is learned, so m is 0, but for rounding, whatever pairs are drawn.

    At other timesteps it reached 800 logits, and gradients of a loss that is saturated are too small for normal
    numbers, with which a CPU is several times slower.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    from arms import Ours

    arm = Ours("toy", "full", torch.device("cpu"), 2, 32)
    for seeds in ([0, 1], [7, 8]):
        arm.batch.seeds = seeds
        assert arm.step(True)["rewards/margins"].abs().max() < 0.01
    assert arm.step(False)["rewards/margins"].abs().max() < 0.01


def bench(*options: str) -> dict:
    command = [sys.executable, str(FOLDER / "step.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_counter_agrees_with_the_known_operations(model: str):
    """Within 1%: how many operations a LoRA adds depends on its rank."""
    found = bench("--model", model, "--count")
    for table in ("TFLOP an image (counted, floor)", "TFLOP a pair (counted, floor)"):
        known = {name: pair for name, pair in found[table].items() if pair[1] is not None}
        assert len(known) >= 3
        for name, (counted, floor) in known.items():
            assert counted == pytest.approx(floor, rel=0.01 if floor > 0.1 else 0.05), name
    every, upper = found["TFLOP a pair, cached reference"].values()
    assert upper < 0.9 * every


@pytest.mark.slow
def test_a_run_on_the_toy_world():
    found = bench("--model", "toy", "--steps", "1", "--warmup", "0", "--batch_size", "2")
    arms = found["arms"]
    assert list(arms) == list(found["memory"]) == ["published", "cached", "reference cache"]
    work = [arm["TFLOP a pair"] for arm in arms.values()]
    assert work[0] > work[1] > work[2] > 0
    assert set(arms["published"]["share of the step, %"]) == {
        "VAE", "text", "policy", "reference", "backward", "optimizer",
    }  # fmt: skip
    for name in ("cached", "reference cache"):
        assert {"policy", "backward", "optimizer", "noise"} <= set(arms[name]["share of the step, %"])
        assert arms[name]["operations allow"] == pytest.approx(work[0] / arms[name]["TFLOP a pair"], rel=0.01)


@pytest.mark.slow
def test_flow_models_are_counted_at_their_true_size(monkeypatch: pytest.MonkeyPatch):
    """SANA has 1.6e9 weights by its makers; a LoRA has the eight attention projections of each of its 20 blocks."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from flow import MODELS, counts, report

    found = counts(MODELS["sana"], 1024)
    assert found["weights"] == pytest.approx(1.6e9, rel=0.01)
    assert found["layers"] == 160
    stated = report("sana", 1024, found)
    assert stated["TFLOP a pair"] == pytest.approx(2 * found["forward"] + (found["step"] - found["forward"]), abs=0.1)
    assert stated["GB of activations, checkpointing"] < stated["GB of activations"]
