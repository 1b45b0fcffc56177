"""What torch.compile makes of a step, counted: no breaks in a graph, and nothing compiled again after the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from lit_safety.adapters.lora import LoRA
from lit_safety.modules import PreferenceModule
from lit_safety.modules.speed import Speed
from lit_safety.objectives import DiffusionDPO
from tests.helpers.batches import batch_of
from tests.helpers.flow_pipelines import save_flow


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Graphs of other tests neither count nor help."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def module_of(pipeline: Path, compiled: str | None) -> PreferenceModule:
    module = PreferenceModule(str(pipeline), DiffusionDPO(100.0), LoRA(2), speed=Speed(compile=compiled))
    module.configure_model()
    return module


def pass_on(module: PreferenceModule, first: int) -> None:
    """A training step and a validation step, each with policy and reference, on two pairs of their own."""
    batch = batch_of([first, first + 1])
    module.train()
    loss = module.loss(module.errors(batch), batch).loss.mean()
    torch.autograd.grad(loss, [parameter for _, parameter in module.trainable_parameters()])
    module.eval()
    with torch.no_grad():
        module.loss(module.errors(batch), batch)


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_nothing_is_compiled_after_the_warm_up(family: str, tiny_pipeline: Path, tmp_path: Path):
    """Other pairs, timesteps and noise meet the same graphs; a graph that is made again would be an error."""
    pipeline = tiny_pipeline if family == "unet" else save_flow(family, tmp_path / family)
    module = module_of(pipeline, "aot_eager")
    for first in (0, 2):
        pass_on(module, first)
    warm = counters["stats"]["unique_graphs"]
    assert warm > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first in (4, 6, 8):
            pass_on(module, first)
    assert counters["stats"]["unique_graphs"] == warm
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_a_whole_unet_with_adapters_is_one_graph(tiny_pipeline: Path):
    module = module_of(tiny_pipeline, None).train()
    noisy, timesteps, _, conditioning = module.noised(batch_of([0, 1]))
    unet: Any = module.backbone.denoiser
    found = torch._dynamo.explain(unet)(noisy, timesteps, conditioning["encoder_hidden_states"], return_dict=False)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
