import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.pipelines import check_writable, load_pipeline


def edit(pipeline: Path, folder: Path, file: str, **changes: object) -> Path:
    copy = Path(shutil.copytree(pipeline, folder))
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | changes))
    return copy


def test_draws_with_ddim_in_the_pipelines_own_schedule(pipeline: Path, tmp_path: Path) -> None:
    other = edit(pipeline, tmp_path / "p", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    config = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(config | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    scheduler = load_pipeline(other, Arm()).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.prediction_type == "v_prediction"


def test_reads_weights_that_are_stored_in_half_precision_only(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None).to(torch.float16)
    stock.save_pretrained(tmp_path / "half", variant="fp16")
    assert load_pipeline(tmp_path / "half", Arm()).unet.dtype == torch.float32


def test_a_folded_adapter_draws_what_the_loaded_one_draws(pipeline: Path, adapter: Path, ask) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    settings, prompts = DrawingSettings(steps=3), [ask("clean", benign="car", seed=3)]
    stock = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    base = draw_batch(stock, prompts, settings)
    stock.load_lora_weights(adapter)
    expected = draw_batch(stock, prompts, settings)
    found = draw_batch(load_pipeline(pipeline, Arm(str(adapter))), prompts, settings)
    assert abs(found - expected).max() < 1e-4
    assert abs(found - base).max() > 1e-3


@pytest.mark.parametrize("damage", ["missing", "cut", "no json"])
def test_a_damaged_pipeline_is_one_line(pipeline: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(pipeline, tmp_path / "copy"))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="copy does not load") as error:
        load_pipeline(copy, Arm())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["abacus", "cuda:77"])
def test_a_device_that_is_not_there(pipeline: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device}"):
        load_pipeline(pipeline, Arm(), device)


def test_a_folder_nobody_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission"):
        check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_composed_adapters_add_up(pipeline: Path, adapter: Path, tmp_path: Path, ask) -> None:
    """0.7 and -0.2 of one adapter, from two folders, are 0.5 of it."""
    twin = Path(shutil.copytree(adapter, tmp_path / "twin"))
    settings, prompts = DrawingSettings(steps=2), [ask("clean", benign="car", seed=3)]
    both = load_pipeline(pipeline, Arm(str(adapter), 0.7, adapters={str(twin): -0.2}))
    half = load_pipeline(pipeline, Arm(str(adapter), 0.5))
    drawn = draw_batch(both, prompts, settings)
    assert abs(drawn - draw_batch(half, prompts, settings)).max() < 1e-4
    assert abs(drawn - draw_batch(load_pipeline(pipeline, Arm()), prompts, settings)).max() > 1e-3


def text_lora(pipeline: Path, file: Path, number: int = 1) -> Path:
    """A random LoRA of the text encoder alone."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    encoder = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None).text_encoder
    width = encoder.config.hidden_size
    layer = f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"
    draw = torch.Generator().manual_seed(0)
    pair = torch.randn(2, width, generator=draw), torch.randn(width, 2, generator=draw)
    save_file({f"{layer}.lora_down.weight": pair[0], f"{layer}.lora_up.weight": pair[1]}, file)
    return file


def test_a_text_encoders_lora_draws_and_stays_when_an_attacker_opens_the_network(
    pipeline: Path, tmp_path: Path
) -> None:
    from lit_safety.attacks.network import open_network

    arm = Arm(adapter=str(text_lora(pipeline, tmp_path / "x.safetensors")))
    drawn, base = load_pipeline(pipeline, arm), load_pipeline(pipeline, Arm())
    opened = open_network(pipeline, arm, "cpu")
    ids = torch.tensor([[0, 2, 3, 1]])
    with torch.no_grad():
        found, expected, stock = (
            encoder(ids).last_hidden_state
            for encoder in (opened.pipe.text_encoder, drawn.text_encoder, base.text_encoder)
        )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, stock, atol=1e-3)


def test_an_arm_whose_adapter_loads_in_part_is_refused(pipeline: Path, adapter: Path, tmp_path: Path) -> None:
    """Alone, next to another one, and as an attacker's."""
    from lit_safety.attacks.network import open_network

    file = str(text_lora(pipeline, tmp_path / "x.safetensors", number=2))
    for arm in (Arm(adapter=file), Arm(adapters={str(adapter): 1.0, file: 0.5})):
        with pytest.raises(UserError, match=rf"{file}.*text_encoder_2"):
            load_pipeline(pipeline, arm)
        with pytest.raises(UserError, match=rf"{file}.*text_encoder_2"):
            open_network(pipeline, arm, "cpu")


def test_images_are_decoded_one_by_one_where_memory_is_small(pipeline: Path, monkeypatch) -> None:
    """8 maps of the decoder's width x 4 bytes x 4 images x 32 x 32 pixels may be half of the free memory at most.

    The free memory of a GPU is made up here: what a GPU really needs was not measured.
    """
    from lit_safety.drawing import pipelines

    pipe = load_pipeline(pipeline, Arm())
    width = pipe.vae.config.block_out_channels[0]
    needed = pipelines.decoding_bytes(4, 32 * 32, width, 4)
    assert needed == 8 * width * 4 * 4 * 32 * 32
    assert pipelines.slice_decoding(pipe, 4, 32) is False
    assert not pipe.vae.use_slicing, "nothing is changed on a CPU"
    for free, images, expected in ((2 * needed - 1, 4, True), (2 * needed, 4, False), (0, 1, False)):
        monkeypatch.setattr(pipelines, "free_memory", lambda device, free=free: free)
        assert pipelines.slice_decoding(pipe, images, 32) is expected
        assert pipe.vae.use_slicing is expected
