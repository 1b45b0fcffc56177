"""What version 0.1 wrote is still read: a run's checkpoint and config, a LoRA, a user adapter, shards, a cost model.

The files in this folder were written by version 0.1. The checkpoint is of two steps of SC-DPO on the toy world, by the
config next to it, with one adapted layer. The user adapter is of random weights for the network below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.adapters.lora_file import read_lora
from lit_safety.adapters.user_file import load_user_adapter
from lit_safety.cost_model.files import load_cost_model
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.manifest import load_manifest

HERE = Path(__file__).parent
TOYWORLD = HERE.parents[1] / "data" / "toyworld"
PAIRS = "the fingerprint of data.init_args.train and its filters"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return held


def test_a_fit_goes_on_from_a_checkpoint_by_its_own_config(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "scdpo" / "old"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = torch.load(HERE / "scdpo" / "last.ckpt", weights_only=True)
    # The world's pairs were written again since: within a pass over others a checkpoint is refused, and rightly so.
    pairs = PreferenceDataModule(train=str(TOYWORLD / "shards/train"), val=str(TOYWORLD / "shards/val"), batch_size=4)
    for held in (checkpoint["PreferenceDataModule"], *checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]):
        held["signature"][PAIRS] = pairs._pairs_sha256()
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    before = weights(HERE / "scdpo" / "last.ckpt")
    arguments = ["fit", "--config", str(HERE / "scdpo" / "config.yaml"), "--run.root", str(tmp_path / "runs")]
    arguments += ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.max_steps", "3"]
    arguments += ["--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.callbacks", "lit_safety.callbacks.AtomicModelCheckpoint"]
    arguments += ["--trainer.callbacks.save_last", "true", "--trainer.callbacks.every_n_train_steps", "3"]
    assert main(arguments) == 0
    (saved,) = (path for path in tmp_path.rglob("last.ckpt") if path.parent.parent != run)
    assert torch.load(saved, weights_only=True)["global_step"] == 3
    after = weights(saved)
    assert after.keys() == before.keys()
    assert all(LAYER in name for name in after)
    assert not all(torch.equal(after[name], before[name]) for name in before)
    for name, value in after.items():  # one step of the warm-up moves it a little
        torch.testing.assert_close(value, before[name], atol=0.01, rtol=0)


def test_a_lora_is_read() -> None:
    (layer,) = read_lora(HERE / "lora", None).values()
    held = load_file(HERE / "lora" / "pytorch_lora_weights.safetensors")
    assert layer.rank == 1
    assert layer.scale == 2.0  # alpha 2 of rank 1
    assert any(torch.equal(layer.a, one) for one in held.values())


def test_a_user_adapter_is_read() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    adapter = load_user_adapter(unet, HERE / "user_adapter")
    generator = torch.Generator().manual_seed(3)  # as they were drawn when it was written
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.data, torch.randn(parameter.shape, generator=generator), msg=name)


@pytest.mark.parametrize("folder", ["train", "val", "test", "cost_model"])
def test_the_shipped_shards_are_of_it(folder: str) -> None:
    assert load_manifest(str(TOYWORLD / "shards" / folder)).classes


def test_the_shipped_cost_model_is_of_it() -> None:
    assert load_cost_model(str(TOYWORLD / "cost_model")) is not None
