"""A student's assistant: part of every prediction of a fit, of nothing that is drawn, and of no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_safety.__main__ import main
from lit_safety.adapters.load_lora import load_lora
from lit_safety.adapters.lora import LoRA, adapter_layers, adapters_off
from lit_safety.adapters.lora_file import write_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones import load_backbone
from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.call import call_options
from lit_safety.backbones.settings import FlowSettings, GuidedFlowSettings
from lit_safety.core.errors import UserError
from tests.helpers.flow_pipelines import save_flow
from tests.helpers.small_fits import small_fit

#: One layer that a LoRA adapts by default and one that it does not.
LAYERS = {
    "flux": ["transformer_blocks.0.attn.to_q", "x_embedder"],
    "z_image": ["layers.0.attention.to_q", "layers.1.attention.to_k"],
}
STUDENTS = {
    "flux": ("schnell", {"guided": False, "use_dynamic_shifting": False, "shift": 1.0}),
    "z_image": ("Turbo", {}),
}
SETTINGS = {"flux": GuidedFlowSettings, "z_image": FlowSettings}
KEY = "model.init_args.backbone.init_args.assistant"


def update(network: torch.nn.Module, layer: str, seed: int, size: float = 0.3) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    weight = network.get_submodule(layer).weight
    a, b = torch.randn(2, weight.shape[1], generator=random), torch.randn(weight.shape[0], 2, generator=random)
    return LowRank(a * size, b * size, 0.5)


def save_assistant(folder: Path, network: torch.nn.Module, family: str, seed: int = 0, size: float = 0.3) -> Path:
    """As diffusers writes it; of Z-Image as ai-toolkit does."""
    folder.mkdir()
    layers = {f"transformer.{one}": update(network, one, seed, size) for one in LAYERS[family]}
    file = write_lora(folder / "assistant.safetensors", layers)
    if family == "z_image":  # which has no alphas: the scale is 1
        tensors = {key.replace("transformer.", "diffusion_model."): one for key, one in load_file(file).items()}
        save_file(tensors, file)
    return file


@pytest.fixture(scope="module", params=list(STUDENTS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def student(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, settings = STUDENTS[family]
    return save_flow(family, tmp_path_factory.mktemp("students") / name, **settings)


@pytest.fixture(scope="module")
def plain(student: Path, family: str) -> Any:
    """The student's stock pipeline."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def file(plain: Any, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("assistants") / "one", plain.transformer, family)


@pytest.fixture
def assisted(student: Path, family: str, file: Path) -> Backbone:
    return load_backbone(str(student), settings=SETTINGS[family](assistant=str(file)))


def inputs(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor, Any]:
    with torch.no_grad():
        text = backbone.encode_text(["a gun", "a red cat"])
        shape = backbone.posterior(torch.zeros(2, 3, 32, 32))[:, 0].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.tensor([300.0, 700.0]), text


def draw(pipe: Any) -> np.ndarray:
    return np.asarray(
        pipe(
            prompt=["a red cat"], height=32, width=32, num_inference_steps=2, output_type="np",
            generator=[torch.Generator().manual_seed(3)], **call_options(pipe, 1.0, count=1),
        ).images
    )  # fmt: skip


def test_a_student_alone_is_refused_and_both_ways_out_are_named(student: Path, family: str) -> None:
    with pytest.raises(UserError, match=f"train its base.*{KEY}.*training.adapter"):
        load_backbone(str(student))


def test_predictions_are_those_with_the_file_loaded_and_drawings_those_without(
    assisted: Backbone, plain: Any, family: str, file: Path, student: Path
) -> None:
    noisy, timesteps, text = inputs(assisted)
    before = draw(plain)
    with torch.no_grad():
        found = assisted.predict(noisy, timesteps, text)
        drawn = draw(assisted.pipeline())
        again = assisted.predict(noisy, timesteps, text)
        assert assisted.assistant is not None
        assert assisted.assistant.on
        other = type(plain).from_pretrained(student)
        load_lora(other, file)
        assisted.denoiser.load_state_dict(plain.transformer.state_dict())  # it has not moved: no name is new
        raw = type(assisted).predict(assisted, noisy, timesteps, text)  # not by way of the assistant
        assisted.denoiser = other.transformer
        loaded = type(assisted).predict(assisted, noisy, timesteps, text)
    assert np.abs(drawn - before).max() < 1e-6  # the autoencoder is in another memory format
    assert torch.equal(found, again)
    assert (found - raw).abs().max() > 1e-2
    torch.testing.assert_close(found, loaded, rtol=1e-5, atol=1e-5)


def test_policy_and_reference_are_one_function_at_the_start_and_gradients_reach_the_lora_alone(
    assisted: Backbone, family: str
) -> None:
    """B is 0: the margin is 0 to the bit. Where activations are computed again, the backward pass has the assistant in
    them too, although a drawing came between two steps."""
    noisy, timesteps, text = inputs(assisted)
    torch.manual_seed(0)
    trained = LoRA(rank=2).with_targets(assisted.lora_targets()).attach(assisted.denoiser, "policy")
    with torch.no_grad(), adapters_off(adapter_layers(assisted.denoiser)):
        reference = assisted.predict(noisy, timesteps, text)
    assert torch.equal(assisted.predict(noisy, timesteps, text), reference)

    def gradients() -> list[torch.Tensor]:
        draw(assisted.pipeline())
        assisted.predict(noisy, timesteps, text).square().mean().backward()
        found = [one.grad.clone() for one in trained if one.grad is not None]
        for one in trained:
            one.grad = None
        return found

    kept = gradients()
    assert len(kept) == len(trained)
    assert not any(one.requires_grad for name, one in assisted.denoiser.named_parameters() if ".policy." not in name)
    assisted.denoiser.train()
    assisted.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    for mine, theirs in zip(gradients(), kept, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_wrong_files_are_refused(student: Path, plain: Any, family: str, file: Path, tmp_path: Path) -> None:
    def refused(path: Path | str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            load_backbone(str(student), settings=SETTINGS[family](assistant=str(path)))

    refused(tmp_path / "missing", "assistant` no adapter")
    none = save_assistant(tmp_path / "none", plain.transformer, family, size=0.0)
    refused(none, "0 everywhere")
    tensors = load_file(file)
    name = next(key for key in tensors if "lora_A" in key)
    for word, broken in (
        ("half", {key: one for key, one in tensors.items() if key != name}),
        ("other", {**tensors, name: torch.zeros(2, 3)}),
        (
            "strange",
            {f"transformer.nowhere.{number}.lora_A.weight": one for number, one in enumerate(tensors.values())},
        ),
        ("nan", {**tensors, name: tensors[name] * float("nan")}),
    ):
        save_file(broken, tmp_path / f"{word}.safetensors")
        refused(tmp_path / f"{word}.safetensors", word)


def test_a_family_without_such_files_takes_none(file: Path, tmp_path: Path) -> None:
    folder = save_flow("sana", tmp_path / "sana")
    with pytest.raises(UserError, match="no LoRA is known"):
        load_backbone(str(folder), settings=FlowSettings(assistant=str(file)))


def test_a_fit_exports_the_trained_lora_alone_and_resumes_with_the_same_assistant(
    student: Path, plain: Any, family: str, file: Path, pair_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    overlay = tmp_path / "student.yaml"
    overlay.write_text(f"""
model:
  init_args:
    lora: {{init_args: {{rank: 2, alpha: 2, target_modules: null}}}}
    backbone:
      class_path: lit_safety.backbones.{SETTINGS[family].__name__}
      init_args: {{assistant: {file}}}
""")
    keep = "{every_n_train_steps: 1, save_top_k: -1, filename: '{step}', enable_version_counter: false}"
    callbacks = (
        "[{class_path: lit_safety.callbacks.ExportAdapter}, "
        f"{{class_path: lit_safety.callbacks.AtomicModelCheckpoint, init_args: {keep}}}]"
    )
    settings = {
        "model.init_args.pretrained": student, "data.init_args.resolution": 32, "trainer.max_steps": 3,
        "trainer.limit_val_batches": 0, "trainer.callbacks": callbacks, "model.init_args.drawing.steps": 1,
    }  # fmt: skip
    command = small_fit("fit", ["scdpo.yaml", str(overlay)], tmp_path / "runs", pair_shards, settings)
    before = file.read_bytes()
    assert main(command) == 0, capsys.readouterr().err
    whole = (tmp_path / "runs" / "scdpo" / "latest").resolve()
    trained = load_file(whole / "adapter" / "pytorch_lora_weights.safetensors")
    assert file.read_bytes() == before
    assert {one.shape[0] for key, one in trained.items() if ".lora_A." in key} == {2}
    assert max(float(one.abs().max()) for key, one in trained.items() if ".lora_B." in key) > 0
    if family == "flux":
        assert not any("x_embedder" in key for key in trained)
    held = torch.load(whole / "checkpoints" / "step=1.ckpt", weights_only=True)
    assert {key for key in held["state_dict"] if ".policy." not in key} == set()
    assert "in training alone" in (whole / "adapter" / "README.md").read_text()
    step = str(whole / "checkpoints" / "step=1.ckpt")
    assert main([*command, "--ckpt_path", step]) == 0, capsys.readouterr().err
    resumed = (tmp_path / "runs" / "scdpo" / "latest").resolve()
    assert resumed != whole
    again = load_file(resumed / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[key], one) for key, one in trained.items())
    other = save_assistant(tmp_path / "other", plain.transformer, family, seed=1)
    overlay.write_text(overlay.read_text().replace(str(file), str(other)))
    capsys.readouterr()
    assert main([*command, "--ckpt_path", step]) != 0
    assert "trained with another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [([], "train with DDP"), (["--model.init_args.policy", "full"], "train one"),
     (["--model.init_args.speed.compile", "eager"], "speed.compile")],
)  # fmt: skip
def test_what_cannot_leave_it_out_again_is_refused(
    more: list[str], named: str, tmp_path: Path, pair_shards: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not more:
        monkeypatch.setattr("lit_safety.modules.preference.under_fsdp", lambda trainer: True)
    folder = save_flow("flux", tmp_path / "schnell", **STUDENTS["flux"][1])
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    file = save_assistant(tmp_path / "one", network, "flux")
    settings = {
        "model.init_args.pretrained": folder, "data.init_args.resolution": 32, "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0, "trainer.callbacks": "[]",
        "model.init_args.backbone": f"{{class_path: GuidedFlowSettings, init_args: {{assistant: {file}}}}}",
    }  # fmt: skip
    assert main(small_fit("fit", ["scdpo.yaml"], tmp_path / "runs", pair_shards, settings, more)) != 0
    assert named in capsys.readouterr().err
