"""Every family of rectified flow against its stock pipeline, scheduler and training script, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_safety.backbones import BackboneSettings, FlowSettings, GuidedFlowSettings, load_backbone
from lit_safety.backbones.backbone import Backbone, encode_alike
from lit_safety.backbones.call import call_options, passes_of
from lit_safety.core.errors import UserError
from tests.helpers.flow_pipelines import FAMILIES, save_flow

PROMPTS = ["a red cat", "a gun and a house with a blue cat"]
#: Not square, so that rows and columns cannot be taken for each other.
SIZE = (32, 64)
STEPS = 3


def plain(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    return without + scale * (with_text - without)


def renormed(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    """Qwen-Image: each token (of 2 x 2 latents) as long as the prediction with text."""
    mixed = plain(with_text, without, scale)

    def length(one: Tensor) -> Tensor:
        blocks = one.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).square().sum(dim=(1, 3, 5)).sqrt()
        return blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]

    return mixed * length(with_text) / length(mixed)


@dataclass(frozen=True)
class Family:
    guidance: float
    settings: BackboneSettings | None = None
    combine: Callable[[Tensor, Tensor, float], Tensor] | None = plain
    """Of two predictions, where guidance takes two passes."""


CASES = {
    "flux": Family(4.0, GuidedFlowSettings(guidance=4.0), combine=None),
    "klein": Family(4.0),
    "flux_2": Family(4.0, GuidedFlowSettings(guidance=4.0), combine=None),
    "qwen_image": Family(3.0, combine=renormed),
    "z_image": Family(3.0),
    "sana": Family(4.5),
}


@pytest.fixture(scope="module", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flow(name, tmp_path_factory.mktemp("flow") / name)


@pytest.fixture(scope="module")
def backbone(name: str, folder: Path) -> Backbone:
    return load_backbone(str(folder), settings=CASES[name].settings)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(stock: Any, name: str, **more: Any) -> Any:
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    more.setdefault("num_inference_steps", STEPS)
    return stock(
        prompt=list(PROMPTS), height=SIZE[0], width=SIZE[1], generator=seeds,
        **call_options(stock, CASES[name].guidance, count=2), **more,
    ).images  # fmt: skip


def noise(backbone: Backbone, channels: int) -> Tensor:
    """The noise that the stock pipeline begins with."""
    height, width = backbone.latent_size(*SIZE)
    return torch.cat(
        [torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(row)) for row in range(2)]
    )


def channels_of(name: str) -> int:
    return 16 if name in ("klein", "flux_2") else 4


class Given(Exception):
    pass


def arguments(network: torch.nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """What a network's first call is given by ``run``, by name, tensors in float32."""
    import inspect

    found: dict[str, Any] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(type(module).forward)
        found.update(signature.bind(module, *args, **kwargs).arguments)
        raise Given

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), pytest.raises(Given):
            run()
    finally:
        handle.remove()
    idle = ("self", "return_dict", "joint_attention_kwargs", "attention_kwargs")
    return {key: value for key, value in found.items() if key not in idle and value is not None}


def alike(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        # The stock batch may be one with the empty prompts: kernels then round otherwise.
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=1e-5, atol=2e-6, msg=lambda told: f"{where}: {told}"
        )
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            alike(one, other, where)
    else:
        assert found == expected, where


def test_the_transformer_is_given_what_the_stock_pipeline_gives_it(name: str, backbone: Backbone, stock: Any):
    """Text, masks, ids, packed latents, time and guidance of the first step."""
    expected = arguments(stock.transformer, lambda: call(stock, name))
    prompts = list(PROMPTS)
    if name == "sana":
        prompts = ["", "", *PROMPTS]
    elif name == "z_image":
        prompts = [*PROMPTS, "", ""]
    x = noise(backbone, channels_of(name)).repeat(len(prompts) // 2, 1, 1, 1)
    t = stock.scheduler.timesteps[:1].expand(len(prompts))
    with torch.no_grad():
        text = encode_alike(backbone, prompts)
    found = arguments(backbone.denoiser, lambda: backbone.predict(x, t, text))
    assert set(found) == set(expected)
    for key, value in expected.items():
        alike(found[key], value, key)


def test_guidance_calls_the_transformer_as_often_as_regmean_counts(name: str, stock: Any):
    """Rows of every call of one step with two prompts; which half comes first, the test above sees."""
    calls: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["hidden_states"] if not args else args[0]))

    handle = stock.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call(stock, name, num_inference_steps=1, output_type="latent")
    finally:
        handle.remove()
    assert calls == [2 * len(one) for one in passes_of(type(stock).__name__, CASES[name].guidance)]


def test_a_text_alone_is_its_row_in_a_batch_and_has_a_fixed_length(backbone: Backbone):
    with torch.no_grad():
        both, one = backbone.encode_text(PROMPTS), backbone.encode_text(PROMPTS[:1])
    for key, rows in both.items():
        assert rows.is_floating_point()
        torch.testing.assert_close(one[key], rows[:1], rtol=1e-4, atol=1e-5)


def test_the_stock_scheduler_stepped_with_our_predictions_ends_in_the_stock_latents(
    name: str, backbone: Backbone, stock: Any
):
    case = CASES[name]
    expected = call(stock, name, output_type="latent")
    scheduler = stock.scheduler
    timesteps = scheduler.timesteps
    if name == "sana":
        scheduler.set_timesteps(STEPS)
    else:
        scheduler._step_index = None
    x = noise(backbone, channels_of(name))
    with torch.no_grad():
        text, none = encode_alike(backbone, PROMPTS), encode_alike(backbone, ["", ""])
        for t in timesteps:
            steps = t.expand(2)
            found = backbone.predict(x, steps, text)
            if case.combine is not None:
                found = case.combine(found, backbone.predict(x, steps, none), case.guidance)
            x = scheduler.step(found, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, as_latents(name, expected, stock), rtol=1e-5, atol=1e-5)


def as_latents(name: str, drawn: Tensor, stock: Any) -> Tensor:
    """What the stock pipeline calls latents, by its own functions, as (B, C, h, w)."""
    if name in ("flux", "qwen_image"):
        unpacked = stock._unpack_latents(drawn, *SIZE, stock.vae_scale_factor)
        return unpacked if name == "flux" else unpacked[:, :, 0]
    if name == "flux_2":
        return drawn.transpose(1, 2).unflatten(2, (SIZE[0] // 4, SIZE[1] // 4))
    if name == "klein":
        mean = stock.vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(stock.vae.bn.running_var.view(1, -1, 1, 1) + stock.vae.config.batch_norm_eps)
        return (stock._patchify_latents(drawn) - mean) / std
    return drawn


def official(name: str, vae: Any, images: Tensor) -> Tensor:
    """Scaled latents of diffusers' training script for the family, the posterior's mean taken for its sample."""
    if name == "sana":
        return vae.encode(images).latent * vae.config.scaling_factor
    if name == "qwen_image":
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        return ((vae.encode(images.unsqueeze(2)).latent_dist.mode() - mean) * std)[:, :, 0]
    found = vae.encode(images).latent_dist.mode()
    if name in ("klein", "flux_2"):
        from diffusers import Flux2Pipeline

        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return (Flux2Pipeline._patchify_latents(found) - mean) / std
    return (found - vae.config.shift_factor) * vae.config.scaling_factor


def test_the_training_target_is_that_of_the_official_script(name: str, backbone: Backbone, stock: Any):
    """Its latents, x_t = (1 - s) x + s n, target n - x, on the same numbers; one step along it leads to the image."""
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = backbone.posterior(images)
        expected = official(name, stock.vae, images)
    assert posterior.shape == (2, 2, channels_of(name), *backbone.latent_size(*SIZE))
    assert posterior.is_contiguous()
    assert posterior[:, 1].any() == (name != "sana")  # the one encoder that gives no deviation
    latents = backbone.latents(posterior, torch.zeros_like(posterior[:, 0]))
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    drawn, t = torch.randn_like(latents), torch.tensor([250.0, 900.0])
    sigma = torch.tensor([0.25, 0.9]).view(2, 1, 1, 1)
    noisy = backbone.add_noise(latents, drawn, t)
    torch.testing.assert_close(noisy, (1.0 - sigma) * latents + sigma * drawn)
    target = backbone.target(latents, drawn, t)
    assert torch.equal(target, drawn - latents)
    torch.testing.assert_close(noisy - sigma * target, latents, rtol=1e-4, atol=1e-5)


def test_a_deviation_is_scaled_as_its_latents_are(name: str, backbone: Backbone, stock: Any):
    """Noise 1 moves a latent by its deviation in the unit of scaled latents."""
    if name == "sana":
        pytest.skip("its encoder has none")
    images = torch.rand(1, 3, *SIZE) * 2 - 1
    with torch.no_grad():
        found = backbone.posterior(images)
        sampled = stock.vae.encode(images.unsqueeze(2) if name == "qwen_image" else images).latent_dist
        sampled.mean = sampled.mean + sampled.std
        sampled.mode = lambda: sampled.mean
        moved = official(name, _Fixed(stock.vae, sampled), images)
    torch.testing.assert_close(backbone.latents(found, torch.ones_like(found[:, 0])), moved, rtol=1e-4, atol=1e-5)


class _Fixed:
    """An autoencoder that gives one distribution."""

    def __init__(self, vae: Any, found: Any) -> None:
        self.config, self.bn, self.found = vae.config, getattr(vae, "bn", None), found

    def encode(self, images: Tensor) -> Any:
        return type("Encoded", (), {"latent_dist": self.found})


def test_timesteps_of_training_are_those_of_inference_or_of_the_script(name: str, backbone: Backbone, folder: Path):
    """u = 0.5: by the stock scheduler at this size, and by the script's scheduler."""
    half, size = torch.tensor([0.5]), backbone.latent_size(*SIZE)
    tokens = backbone.tokens(*size)  # type: ignore[attr-defined]
    shift = {"flux": 2.71828**(0.5 + 0.65 * (tokens - 256) / 3840),
             "qwen_image": 2.71828**(0.5 + 0.4 * (tokens - 256) / (8192 - 256))}.get(name, 3.0)  # fmt: skip
    if name in ("klein", "flux_2"):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        shift = 2.71828 ** compute_empirical_mu(tokens, 50)
    sigma = shift / (shift + 1)
    if name == "qwen_image":
        sigma = 0.02 + 0.98 * sigma  # shift_terminal
    torch.testing.assert_close(backbone.timesteps(half, size), torch.tensor([1000 * sigma]), rtol=1e-4, atol=0)
    settings = FlowSettings(shift="script", sampling="uniform")
    script = load_backbone(str(folder), denoiser=False, settings=settings)
    assert float(script.timesteps(half)) == pytest.approx(750.0 if name == "z_image" else 500.0, abs=0.01)


def test_a_lora_by_default_is_in_every_block(name: str, backbone: Backbone):
    """Every linear layer that mixes tokens or follows from them: streams of text and fused single blocks too."""
    targets = tuple(backbone.lora_targets())
    blocks = [one for one in dict(backbone.denoiser.named_modules()) if one.rsplit(".", 1)[-1].isdigit()]
    whole = {one for one in blocks if one.split(".")[0] in STREAMS}
    adapted = {
        layer for layer, module in backbone.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and any(layer == end or layer.endswith(f".{end}") for end in targets)
    }  # fmt: skip
    without = [
        block for block in whole if block.count(".") == 1 and not any(one.startswith(f"{block}.") for one in adapted)
    ]
    assert not without
    left = {
        layer for layer, module in backbone.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and layer.split(".")[0] in STREAMS and layer not in adapted
    }  # fmt: skip
    assert not [one for one in left if not any(word in one for word in ("norm", "mod", "adaLN"))], left
    assert all(layer.split(".")[0] in STREAMS for layer in adapted)  # the model's last layer is none of them


STREAMS = (*("transformer_blocks", "single_transformer_blocks", "layers", "noise_refiner", "context_refiner"),)


def test_images_that_cannot_be_cut_into_tokens_are_refused(name: str, backbone: Backbone):
    unit = 2 if name == "sana" else 4
    with pytest.raises(UserError, match=f"multiples of {unit}"):
        backbone.posterior(torch.zeros(1, 3, 32, 32 + unit // 2))


def test_a_prompt_that_is_cut_is_reported(backbone: Backbone):
    assert backbone.too_long(["a cat", "a cat " * 400]) == [False, True]


def test_latents_drawn_by_the_stock_pipeline_are_taken_back(name: str, backbone: Backbone):
    """`merge --method calibrated` draws with the stock pipeline and trains nothing."""
    pipe = backbone.pipeline()
    drawn = pipe(
        prompt=["a cat"], height=32, width=32, num_inference_steps=1, output_type="latent",
        generator=torch.Generator().manual_seed(0), **call_options(pipe, 1.0, count=1),
    ).images  # fmt: skip
    assert backbone.drawn_latents(drawn).shape == (1, channels_of(name), *backbone.latent_size(32, 32))


@pytest.mark.parametrize(
    ("family", "settings", "base"),
    [
        ("flux", {"guided": False, "use_dynamic_shifting": False, "shift": 1.0}, "FLUX.1-dev"),
        ("klein", {"distilled": True}, "FLUX.2-klein-base"),
    ],
    ids=["schnell", "klein distilled"],
)
def test_a_student_of_few_steps_is_refused_with_its_base(
    family: str, settings: dict[str, Any], base: str, tmp_path: Path
):
    folder = save_flow(family, tmp_path / "pipe", **settings)
    with pytest.raises(UserError, match=base):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("family", "called", "base"),
    [
        ("z_image", "Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        ("flux", "FLUX.1-schnell", "FLUX.1-dev"),
        ("qwen_image", "Qwen-Image-Lightning", "Qwen/Qwen-Image"),
    ],
)
def test_a_student_that_its_name_tells_is_refused(family: str, called: str, base: str, tmp_path: Path):
    folder = save_flow(family, tmp_path / called)
    with pytest.raises(UserError, match=base):
        load_backbone(str(folder))


def test_a_student_in_the_hubs_cache_is_recognised_by_its_repository(tmp_path: Path):
    """A folder there is named by its revision."""
    folder = tmp_path / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / "0a1b"
    save_flow("z_image", folder)
    with pytest.raises(UserError, match="Tongyi-MAI/Z-Image"):
        load_backbone(str(folder))
    load_backbone(str(folder), denoiser=False)  # caches of its encoders, which are the base's


@pytest.mark.parametrize(("kind", "told"), [("SanaSprintPipeline", "Sana_1600M"), ("ChromaPipeline", "checkpointing")])
def test_pipelines_that_are_not_trained_are_refused_with_the_reason(kind: str, told: str, tmp_path: Path):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    with pytest.raises(UserError, match=told):
        load_backbone(str(tmp_path))


def test_every_family_is_tested():
    assert set(CASES) == set(FAMILIES)
