"""Seven experts of Stable Diffusion 1.5's size: under a minute on two cores and under 4 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_safety.adapters.lora import ATTENTION_PROJECTIONS, WEIGHTS_NAME
from lit_safety.adapters.lora_file import write_lora
from lit_safety.adapters.low_rank import LowRank

RANK, EXPERTS = 16, 7
COMMAND = """
import resource, sys
from lit_safety.merging.merge import merge
merge(sys.argv[3:], sys.argv[2], method=sys.argv[1])
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    sizes = {n: m.weight.shape for n, m in unet.named_modules() if n.endswith(ATTENTION_PROJECTIONS)}
    # The published count of rank 4 on these layers is 797,184: this is Stable Diffusion 1.5.
    assert sum(4 * (out + inputs) for out, inputs in sizes.values()) == 797_184
    folders = []
    for k in range(EXPERTS):
        folder = tmp_path_factory.mktemp(f"expert{k}")
        torch.manual_seed(k)
        layers = {f"unet.{n}": LowRank(torch.randn(RANK, i), torch.randn(o, RANK)) for n, (o, i) in sizes.items()}
        write_lora(folder / WEIGHTS_NAME, layers)
        folders.append(str(folder))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean", "sum", "svd", "ties", "dare"])
def test_seven_experts_of_real_size(experts: list[str], tmp_path: Path, method: str):
    command = [sys.executable, "-c", COMMAND, method, str(tmp_path / "out"), *experts]
    # Seconds of one core: what the rest of the machine does must not decide, and two cores are not slower than one.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
    seconds, kilobytes = map(float, done.stdout.split()[-2:])
    residual = json.loads((tmp_path / "out" / "report.json").read_text())["residual"]
    size = (tmp_path / "out" / WEIGHTS_NAME).stat().st_size
    print(f"{method}: {seconds:.1f} s, {kilobytes / 1e6:.2f} GB, residual {residual:.2e}, file {size / 1e6:.0f} MB")
    assert seconds < 60
    assert kilobytes < 4e6
