"""Ten wrong lines, one at a time: the named tests must fail on each, and pass on the code as it is.

    python tests/mutate.py                     # the code of this folder
    python tests/mutate.py --at 0.1            # the code before the folders were re-ordered (commit `BEFORE`)
    python tests/mutate.py --only focusing

The same tests catch the same line before and after; `--at 0.1` takes both from git. Nothing here is changed: each line
is replaced in a copy. Prints a table; exit code 1 if a mutant lives or a test fails without one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The last commit in the old order of files.
BEFORE = "d6db594"


@dataclass(frozen=True)
class Mutation:
    """A line, what it becomes, and who must notice."""

    name: str
    right: str
    wrong: str
    file: str
    """In `lit_safety/`."""
    test: str
    """In `tests/`, with the test's name."""
    old_file: str
    old_test: str


def _mutation(
    name: str, right: str, wrong: str, file: str, test: str, old_file: str = "", old_test: str = ""
) -> Mutation:
    test_file, _, function = test.partition("::")
    return Mutation(name, right, wrong, file, test, old_file or file, f"{old_test or test_file}::{function}")


MUTATIONS = (
    _mutation(
        "the margin's sign", "delta(errors) * (-0.5 * beta)", "delta(errors) * (0.5 * beta)",
        "objectives/objective.py", "objectives/test_diffusion_dpo.py::test_margin_and_loss_golden",
        "objectives/pair.py",
    ),
    _mutation(
        "lambda", "m + cost_weight * (cost_chosen - cost_rejected)", "m + cost_weight * (cost_rejected - cost_chosen)",
        "objectives/safety_constrained.py", "objectives/test_safety_constrained.py::test_golden",
    ),
    _mutation(
        "focusing", "torch.exp(gamma * F.logsigmoid(-m_sc))", "torch.exp(gamma * F.logsigmoid(m_sc))",
        "objectives/safety_constrained.py",
        "objectives/test_safety_constrained.py::test_detached_gradient_is_a_power_of_what_is_missing",
    ),
    _mutation(
        "the order's seed", "(seed, epoch) if name is None", "(seed, 0) if name is None",
        "data/reading/order.py",
        "data/reading/test_order.py::test_seed_and_epoch_change_the_order_and_nothing_else_is_needed",
        "data/order.py", "data/test_order.py",
    ),
    _mutation(
        "accumulated batches", "(self.batch_size * self.world * self.accumulate) * self.accumulate",
        "(self.batch_size * self.world * self.accumulate)",
        "data/reading/order.py", "data/reading/test_order.py::test_every_deal_steps_on_the_same_samples",
        "data/order.py", "data/test_order.py",
    ),
    _mutation(
        "LoRA's alpha", "lora_alpha=self.alpha,", "lora_alpha=self.rank,",
        "adapters/lora.py", "adapters/test_lora.py::test_scale_zero_is_the_base_and_scale_is_linear_in_the_update",
    ),
    _mutation(
        "the interval", "p * (1 - p) / n + spread / (4 * n)", "p * (1 - p) / n + spread / (2 * n)",
        "core/intervals.py", "core/test_intervals.py::test_wilson_of_half_of_twenty",
        "evaluation/intervals.py", "evaluation/test_intervals.py",
    ),
    _mutation(
        "the judge's threshold", "harmful=cost > self.threshold", "harmful=cost > 0",
        "judges/cost.py", "judges/test_cost_judge.py::test_the_threshold_is_the_folders",
        "evaluation/cost_judge.py", "evaluation/test_cost_judge.py",
    ),
    _mutation(
        "the rename of a checkpoint", "        path.rename(old)", "        shutil.rmtree(path)",
        "callbacks/checkpoint.py",
        "callbacks/test_checkpoint.py::test_a_kill_between_two_renames_leaves_the_numbered_checkpoint",
    ),
    _mutation(
        "what a merge adds up", "part.b.double() * (part.scale * weight)", "part.b.double() * weight",
        "merging/methods.py", "merging/test_mean_and_sum.py::test_mean_by_hand",
        "merging/factors.py",
    ),
)  # fmt: skip


def copy_of(commit: str, folder: Path) -> Path:
    """The code and its tests, of this folder or of a commit; data is linked."""
    if commit:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, check=True, input=archive)
        return folder
    for name in ("lit_safety", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configs", "data", "docs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def passes(root: Path, tests: list[str]) -> bool:
    """Whether the tests pass.

    Raises:
        RuntimeError: they neither passed nor failed, such as when one is not found.
    """
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", *(f"tests/{test}" for test in tests)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", choices=["0.1"], help="the old code with its old tests instead of this folder's")
    parser.add_argument("--only", default="", help="mutations whose name holds this word")
    given = parser.parse_args()
    chosen = [one for one in MUTATIONS if given.only in one.name]
    where = {one.name: (one.old_file, one.old_test) if given.at else (one.file, one.test) for one in chosen}
    lived = 0
    with tempfile.TemporaryDirectory() as name:
        root = copy_of(BEFORE if given.at else "", Path(name))
        if not passes(root, sorted({test for _, test in where.values()})):
            print("a test fails without any mutation")
            return 1
        print("| mutation | file | test | caught |\n|---|---|---|---|", flush=True)
        for one in chosen:
            file, test = where[one.name]
            path = root / "lit_safety" / file
            text = path.read_text(encoding="utf-8")
            if text.count(one.right) != 1:
                raise RuntimeError(f"{path} holds {one.right!r} {text.count(one.right)} times; once is needed")
            path.write_text(text.replace(one.right, one.wrong), encoding="utf-8")
            caught = not passes(root, [test])
            path.write_text(text, encoding="utf-8")
            lived += not caught
            print(f"| {one.name} | {file} | {test} | {'yes' if caught else 'NO'} |", flush=True)
    return int(lived > 0)


if __name__ == "__main__":
    sys.exit(main())
