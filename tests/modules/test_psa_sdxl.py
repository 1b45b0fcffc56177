"""Users' bounds on SDXL: time ids and the pooled embedding go through next to the user's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from lit_safety.adapters import load_psa
from lit_safety.adapters.user_file import save_user_adapter
from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import PSA
from lit_safety.objectives import DiffusionDPO
from lit_safety.users.table import write_users
from tests.helpers.batches import batch_of

USERS = {f"u{i}": torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(2)}


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_users(tmp_path_factory.mktemp("users"), USERS).parent


@pytest.fixture
def module(tiny_sdxl: Path, users: Path) -> PSA:
    torch.manual_seed(0)
    made = PSA(str(tiny_sdxl), DiffusionDPO(beta=200.0), users=str(users))
    made.configure_model()
    return made


def pairs(left: float = 0.0) -> PairBatch:
    """Two pairs of u0 and u1, cut ``left`` pixels off the left of images of 64 x 32 (width first)."""
    crops = torch.tensor([[[32.0, 64.0, 0.0, left, 32.0, 32.0]] * 2] * 2)
    return replace(batch_of([0, 1]), user_ids=["u0", "u1"], crops=crops)


def test_a_step_trains_user_attention_and_reads_the_true_crop(module: PSA):
    output = module.loss(module.errors(pairs()), pairs())
    assert (output.logs["rewards/margins"] == 0).all()
    output.loss.mean().backward()
    gradients = [p.grad for name, p in module.trainable_parameters() if name.endswith("to_v_user.weight")]
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    _, _, _, conditioning = module.noised(pairs(left=16.0))
    assert conditioning["time_ids"].tolist() == [[32.0, 64.0, 0.0, 16.0, 32.0, 32.0]] * 4
    assert conditioning["text_embeds"].shape == (4, 16)
    with torch.no_grad():
        assert not torch.equal(module.errors(pairs()).policy_chosen, module.errors(pairs(16.0)).policy_chosen)


def test_the_stock_pipeline_draws_for_the_user(module: PSA, tiny_sdxl: Path, users: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(7)
    for _, parameter in module.trainable_parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    save_user_adapter(module.adapter, tmp_path, str(tiny_sdxl))
    module.drawing.steps = 2
    drawn = module.draw(["a gun", "a gun"], [3, 3], ["u0", "u1"])
    assert drawn[0].tobytes() != drawn[1].tobytes()
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    load_psa(pipe, tmp_path, users=users)
    again = pipe(
        prompt=["a gun", "a gun"],
        user=["u0", "u1"],
        generator=[torch.Generator().manual_seed(3) for _ in range(2)],
        num_inference_steps=2,
        guidance_scale=module.drawing.guidance,
    ).images
    assert [one.size for one in again] == [(32, 32)] * 2
    for one, other in zip(drawn, again, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2


def test_a_transformer_is_refused_by_name(tiny_sd3: Path, users: Path):
    module = PSA(str(tiny_sd3), DiffusionDPO(beta=200.0), users=str(users))
    with pytest.raises(UserError, match="SD3Transformer2DModel: has no cross-attention layer named attn2"):
        module.configure_model()
