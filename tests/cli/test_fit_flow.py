"""Fits of every family of rectified flow through the command line, and what stock diffusers makes of their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_safety.__main__ import main
from lit_safety.backbones import load_backbone
from lit_safety.backbones.call import call_options
from lit_safety.data.format.writer import ShardWriter
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.pipelines import load_pipeline
from tests.helpers.documents import CONFIGS
from tests.helpers.flow_pipelines import FAMILIES, save_flow
from tests.helpers.small_fits import small_fit

CALLBACKS = "[{class_path: lit_safety.callbacks.ExportAdapter}]"
WEIGHTS = "pytorch_lora_weights.safetensors"
Fit = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flow(name, tmp_path_factory.mktemp("flow") / name)


@pytest.fixture(scope="module")
def wide_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pairs: chosen images of 48 x 32 and 32 x 48 in turn (width first), rejected ones of 40 x 40."""
    shards = tmp_path_factory.mktemp("shards") / "wide"
    random = np.random.default_rng(0)
    known: dict[str, Any] = {"prompt": "a gun and a house", "prompt_kind": "harmful", "order": "safety"}
    known |= {"harmful": {"chosen": False, "rejected": True}, "cost": {"chosen": -1.0, "rejected": 1.0}}
    with ShardWriter(shards) as writer:
        for number in range(8):
            shape = (32, 48, 3) if number % 2 == 0 else (48, 32, 3)
            images = [random.integers(0, 256, one, dtype=np.uint8) for one in (shape, (40, 40, 3))]
            writer.write(f"{number:04d}", known, *map(Image.fromarray, images))
    return shards


@pytest.fixture
def fit(folder: Path, wide_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    """A fit of two steps on the layers of the family; returns the adapter."""

    def run(shards: Path = wide_shards, *more: str) -> dict[str, torch.Tensor]:
        settings = {
            "model.init_args.pretrained": folder,
            "model.init_args.lr_scheduler.init_args.max_lr": 0.3,
            "model.init_args.prompt_dropout": 0.3,
            "data.init_args.resolution": 32,
            "trainer.max_steps": 2,
            "trainer.limit_val_batches": 0,
            "trainer.callbacks": CALLBACKS,
        }
        overlay = tmp_path / "family.yaml"
        overlay.write_text("model: {init_args: {lora: {init_args: {target_modules: null}}}}")
        arguments = small_fit("fit", ["scdpo.yaml", str(overlay)], tmp_path / "runs", shards, settings, more)
        assert main(arguments) == 0, capsys.readouterr().err
        return load_file(tmp_path / "runs" / "scdpo" / "latest" / "adapter" / WEIGHTS)

    return run


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    return np.asarray(
        pipe(
            prompt=["a red cat", "a gun and a house"], height=32, width=32, num_inference_steps=2, generator=seeds,
            output_type="np", **call_options(pipe, 3.0, count=2),
        ).images
    )  # fmt: skip


def test_a_fit_exports_what_stock_diffusers_loads(fit: Fit, folder: Path, tmp_path: Path):
    """And what `evaluate` loads draws the same."""
    trained = fit()
    assert all(key.startswith("transformer.") for key in trained)
    assert max(float(weight.abs().max()) for key, weight in trained.items() if ".lora_B." in key) > 1e-3
    pipe = DiffusionPipeline.from_pretrained(folder)
    before = draw(pipe)
    adapter = tmp_path / "runs" / "scdpo" / "latest" / "adapter"
    pipe.load_lora_weights(adapter)
    held = {key: weight for key, weight in pipe.transformer.state_dict().items() if ".lora_" in key}
    assert len(held) == len(trained)
    after = draw(pipe)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(draw(load_pipeline(folder, Arm(adapter=str(adapter)))), after, atol=1e-3)


def test_cached_is_uncached_and_a_cache_of_the_reference_is_taken(
    name: str, fit: Fit, folder: Path, wide_shards: Path, tmp_path: Path
):
    cached = tmp_path / "cached"
    command = ["shards", "precompute", str(wide_shards), "--model", str(folder), "--out", str(cached)]
    command += ["--resolution", "32", "--dtype", "float32", "--batch_size", "4"]
    command += ["--reference_draws", "2", "--reference_dropout", "true", "--reference_predictions", "true"]
    assert main(command) == 0
    from_images = fit()
    from_cache = fit(cached, "--data.init_args.use_reference", "false")
    for key, weight in from_images.items():
        torch.testing.assert_close(from_cache[key], weight, rtol=0, atol=0)
    assert fit(cached).keys() == from_images.keys()  # |m| at the start is within its limit


#: Overlay -> the tiny pipeline of its family.
OVERLAYS = {
    "flux1_dev": "flux",
    "flux2_klein": "klein",
    "qwen_image": "qwen_image",
    "z_image": "z_image",
    "sana": "sana",
}


@pytest.mark.parametrize("model", [*OVERLAYS, "sd35"])
def test_an_overlay_trains_the_layers_of_its_family(
    model: str, tiny_sd3: Path, wide_shards: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    """A step with all that the overlay sets but the model and its size; half precision, checkpointing and all."""
    family = OVERLAYS.get(model)
    pipeline = tiny_sd3 if family is None else save_flow(family, tmp_path / model)
    settings = {
        "model.init_args.pretrained": pipeline,
        "data.init_args.resolution": 32,
        "data.init_args.batch_size": 2,
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": 1,
        "trainer.callbacks": CALLBACKS,
    }
    assert main(small_fit("fit", ["scdpo.yaml", f"models/{model}.yaml"], tmp_path / "runs", wide_shards, settings)) == 0
    assert not [one for one in recwarn if "leaves out" in str(one.message)]
    run = tmp_path / "runs" / "scdpo" / "latest"
    written, overlay = (
        yaml.safe_load(path.read_text())["model"]["init_args"]
        for path in (run / "config.yaml", CONFIGS / "models" / f"{model}.yaml")
    )
    assert written["backbone"]["init_args"].items() >= overlay["backbone"]["init_args"].items()
    backbone = load_backbone(str(pipeline))
    targets = tuple(f".{one}" for one in backbone.lora_targets())
    layers = [name for name, _ in backbone.denoiser.named_modules() if f".{name}".endswith(targets)]
    trained = load_file(run / "adapter" / WEIGHTS)
    assert len(trained) == 2 * len(layers)
    assert all(bool(weight.isfinite().all()) for weight in trained.values())


def test_layers_that_a_run_leaves_out_are_counted(wide_shards: Path, tmp_path: Path):
    """A method's YAML names layers of a UNet: of FLUX.1's block of two streams and its two single ones, not all."""
    settings = {
        "model.init_args.pretrained": save_flow("flux", tmp_path / "flux"), "data.init_args.resolution": 32,
        "trainer.max_steps": 1, "trainer.val_check_interval": 1, "trainer.limit_val_batches": 0,
        "trainer.callbacks": CALLBACKS,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"lora.target_modules` leaves out 8 of the 22 layers .* in a Flux"):
        assert main(small_fit("fit", ["scdpo.yaml"], tmp_path / "runs", wide_shards, settings)) == 0


def test_aspect_buckets_train(fit: Fit, wide_shards: Path):
    """40 x 24 and 24 x 40 pixels, by the file's own order of sides."""
    trained = fit(wide_shards, "--data.init_args.aspect_buckets", "true")
    assert all(bool(weight.isfinite().all()) for weight in trained.values())


#: A file of each kind that stock diffusers converts: names of layers, and what they adapt.
FOREIGN = {
    "flux": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha", {
        "double_blocks_0_img_attn_qkv": (32, 96), "double_blocks_0_txt_attn_proj": (32, 32),
        "double_blocks_0_img_mlp_0": (32, 128), "single_blocks_1_linear2": (160, 32),
    }),
    "klein": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None, {
        "double_blocks.0.img_attn.qkv": (32, 96), "double_blocks.0.txt_attn.proj": (32, 32),
        "single_blocks.1.linear1": (32, 288), "single_blocks.1.linear2": (128, 32),
    }),
    "qwen_image": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None, {
        "transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.1.attn.add_k_proj": (32, 32),
        "transformer_blocks.1.img_mlp.net.2": (128, 32),
    }),
    "z_image": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None, {
        "layers.0.attention.to_q": (32, 32), "noise_refiner.0.attention.to_out.0": (32, 32),
        "layers.1.feed_forward.w1": (32, 85),
    }),
}  # fmt: skip
FOREIGN["flux_2"] = FOREIGN["klein"]


def test_a_lora_of_another_program_merges_as_stock_diffusers_reads_it(name: str, folder: Path, tmp_path: Path):
    """kohya's for FLUX.1, ai-toolkit's for the others; of SANA diffusers converts none."""
    if name not in FOREIGN:
        pytest.skip("stock diffusers converts no file for it")
    down, up, alpha, layers = FOREIGN[name]
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (inputs, outputs) in layers.items():
        tensors[down.format(layer)] = torch.randn(4, inputs, generator=generator)
        tensors[up.format(layer)] = torch.randn(outputs, 4, generator=generator)
        if alpha is not None:
            tensors[alpha.format(layer)] = torch.tensor(2.0)
    file = tmp_path / "foreign.safetensors"
    save_file(tensors, file)
    assert main(["merge", str(file), "--pipeline", str(folder), "--out", str(tmp_path / "merged")]) == 0
    found = []
    for path, weight_name in ((tmp_path, file.name), (tmp_path / "merged", WEIGHTS)):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.load_lora_weights(path, weight_name=weight_name)
        pipe.fuse_lora()
        found.append(draw(pipe))
    assert np.abs(found[0] - draw(DiffusionPipeline.from_pretrained(folder))).max() > 1e-2
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)


def test_settings_of_the_family_come_from_yaml(name: str, fit: Fit, wide_shards: Path, tmp_path: Path):
    """Another shift, and for embedded guidance another scale, train another adapter."""
    if name not in ("flux", "z_image"):
        pytest.skip("the way is the same")
    kind = "GuidedFlowSettings" if name == "flux" else "FlowSettings"
    words = ["--model.init_args.backbone", f"lit_safety.backbones.{kind}"]
    plain = fit()
    shifted = fit(wide_shards, *words, "--model.init_args.backbone.init_args.shift", "1.5")
    assert any(not torch.equal(plain[key], shifted[key]) for key in plain)
    if name == "flux":
        guided = fit(wide_shards, *words, "--model.init_args.backbone.init_args.guidance", "1.0")
        assert any(not torch.equal(plain[key], guided[key]) for key in plain)
    written = (tmp_path / "runs" / "scdpo" / "latest" / "config.yaml").read_text()
    assert kind in written
