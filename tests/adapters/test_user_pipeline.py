"""Drawing for users through stock pipelines of both families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from torch import Tensor

from lit_safety.adapters import LoRA, load_psa, unload_psa
from lit_safety.adapters.user_attention import UserAdapter
from lit_safety.adapters.user_file import save_user_adapter
from lit_safety.core.errors import UserError
from lit_safety.users.table import write_users

Make = Callable[..., Any]
IDS = ("anna", "ben")
FAMILY = pytest.mark.parametrize("family", ["sd", "sdxl"])


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding: matrix kernels of some processors round by the batch's size."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def load(tiny_pipeline: Path, tiny_xl_pipeline: Path) -> Callable[..., Any]:
    """`load(family)`: a stock pipeline."""

    def make(family: str = "sd") -> Any:
        pipe: Any = DiffusionPipeline.from_pretrained(tiny_pipeline if family == "sd" else tiny_xl_pipeline)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def folder(load: Make, make_adapter: Make, users: Tensor, tmp_path: Path) -> Callable[..., Path]:
    """`folder(family)`: a random adapter for that pipeline, with two users next to it."""

    def make(family: str = "sd", tokens: int = 4, embedding: int = 12) -> Path:
        out = tmp_path / f"{family}-{tokens}-{embedding}"
        save_user_adapter(make_adapter(load(family).unet, tokens, embedding), out, "tiny")
        write_users(out, dict(zip(IDS, users, strict=True)))
        return out

    return make


def draw(pipe: Any, prompt: Any = ("a red cat", "a house"), seeds: Any = (1, 2), **options: Any) -> np.ndarray:
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    return pipe(
        prompt, num_inference_steps=2, output_type="np", height=32, width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], **({"guidance_scale": 4.0} | options),
    ).images  # fmt: skip


def watch(pipe: Any) -> list[Tensor]:
    """The user tokens of every call of the UNet from now on."""
    seen: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["cross_attention_kwargs"] or {}).get("user_tokens")),
        with_kwargs=True,
    )
    return seen


@FAMILY
def test_each_prompt_of_a_batch_has_its_user(load: Make, folder: Make, users: Tensor, family: str):
    pipe = load(family)
    stock = draw(pipe)
    load_psa(pipe, folder(family))
    both = draw(pipe, user=list(IDS))
    assert np.abs(both - stock).max() > 1e-2
    swapped = draw(pipe, user=["ben", "anna"])
    for row, (prompt, seed, user) in enumerate(zip(("a red cat", "a house"), (1, 2), IDS, strict=True)):
        alone = draw(pipe, prompt, [seed], user=user)
        np.testing.assert_allclose(both[row], alone[0], atol=1e-4)
        assert np.abs(swapped[row] - alone[0]).max() > 1e-3
    np.testing.assert_array_equal(draw(pipe, user_embeds=users), both)
    np.testing.assert_array_equal(draw(pipe, user="anna"), draw(pipe, user_embeds=users[0]))


@FAMILY
def test_guidance_sees_user_and_null_user(load: Make, folder: Make, users: Tensor, family: str):
    """Rows as the pipelines order them: the unconditional half first, images of one prompt side by side."""
    pipe = load(family)
    load_psa(pipe, folder(family))
    projection = UserAdapter.of(pipe.unet).projection
    anna, ben = projection(users)
    null = projection(users, torch.tensor([False, False]))[0]
    seen = watch(pipe)
    draw(pipe, user=list(IDS), seeds=(1, 2, 3, 4), num_images_per_prompt=2)
    close(seen.pop(), torch.stack([null] * 4 + [anna, anna, ben, ben]))
    draw(pipe, user=["anna", None], guidance_scale=1.0)
    close(seen.pop(), torch.stack([anna, null]))
    draw(pipe, negative_prompt=["a gun"] * 2)
    close(seen.pop(), torch.stack([null] * 4))
    if family == "sd":
        given = torch.zeros(2, 16, 32)
        draw(pipe, None, user=list(IDS), prompt_embeds=given, negative_prompt_embeds=given)
        close(seen.pop(), torch.stack([null, null, anna, ben]))


@FAMILY
def test_scale_zero_and_unloading_give_the_stock_image(load: Make, folder: Make, family: str):
    pipe = load(family)
    stock = draw(pipe)
    load_psa(pipe, folder(family), scale=0.0)
    np.testing.assert_array_equal(draw(pipe, user=list(IDS)), stock)
    load_psa(pipe, folder(family))
    assert np.abs(draw(pipe, user=list(IDS)) - stock).max() > 1e-2
    with pytest.raises(UserError, match="unload_psa"):
        pipe.save_pretrained("anywhere")
    unload_psa(pipe)
    np.testing.assert_array_equal(draw(pipe), stock)
    with pytest.raises(UserError, match="no user adapter was loaded"):
        unload_psa(pipe)


@pytest.mark.parametrize(("family", "first"), [("sd", "lora"), ("sdxl", "psa")])
def test_a_lora_and_users_in_one_pipeline(load: Make, folder: Make, tmp_path: Path, family: str, first: str):
    """With user scale 0 the LoRA alone, with the LoRA unloaded the users alone, fused or not the same images."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    trained = load(family).unet
    for parameter in LoRA(rank=4).attach(trained, "policy"):
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", get_peft_model_state_dict(trained, adapter_name="policy")
    )
    adapter = folder(family)
    only = load(family)
    only.load_lora_weights(tmp_path / "lora")
    users_only = load(family)
    load_psa(users_only, adapter)
    pipe = load(family)
    if first == "lora":
        pipe.load_lora_weights(tmp_path / "lora")
    load_psa(pipe, adapter)
    if first == "psa":
        pipe.load_lora_weights(tmp_path / "lora")
    both = draw(pipe, user=list(IDS))
    assert np.abs(both - draw(only)).max() > 1e-2
    assert np.abs(both - draw(users_only, user=list(IDS))).max() > 1e-2
    UserAdapter.of(pipe.unet).set_scale(0)
    np.testing.assert_array_equal(draw(pipe, user=list(IDS)), draw(only))
    UserAdapter.of(pipe.unet).set_scale(1)
    pipe.fuse_lora()
    np.testing.assert_allclose(draw(pipe, user=list(IDS)), both, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(draw(pipe, user=list(IDS)), draw(users_only, user=list(IDS)), atol=1e-4)


def test_an_unknown_user_is_an_error_unless_the_null_user_is_asked_for(load: Make, folder: Make):
    pipe = load()
    load_psa(pipe, folder())
    with pytest.raises(UserError, match=r"user 'zoe' is not in .*users\.safetensors"):
        draw(pipe, user=["anna", "zoe"])
    found = draw(pipe, user=["anna", "zoe"], unknown_user="null")
    np.testing.assert_array_equal(found, draw(pipe, user=["anna", None]))
    with pytest.raises(UserError, match="unknown_user"):
        draw(pipe, user="zoe", unknown_user="ignore")


def test_bad_users_are_named(load: Make, folder: Make, users: Tensor, tmp_path: Path):
    pipe = load()
    place = folder()
    load_psa(pipe, place)
    bad = users.clone()
    bad[1, 3] = float("nan")
    for match, options in (
        ("row 1 holds numbers that are not finite", {"user_embeds": bad}),
        (r"shape \(2, 11\); the adapter was trained on embeddings of 12", {"user_embeds": users[:, :11]}),
        ("3 user embeddings for 2 prompts", {"user_embeds": users[[0, 1, 0]]}),
        ("3 users for 2 prompts", {"user": ["anna"] * 3}),
        ("not both", {"user": "anna", "user_embeds": users}),
        (r"an id such as '0000033', or a list of them, not 33", {"user": 33}),
    ):
        with pytest.raises(UserError, match=match):
            draw(pipe, **options)
    (place / "users.safetensors").unlink()
    load_psa(pipe, place)
    with pytest.raises(UserError, match=r"'anna' cannot be looked up.*users=FILE"):
        draw(pipe, user="anna")
    write_users(tmp_path / "elsewhere", {"anna": users[0, :7]})
    with pytest.raises(UserError, match=r"7 numbers.* 12"):
        load_psa(pipe, place, users=tmp_path / "elsewhere")


def test_other_pipelines_are_refused(load: Make, folder: Make):
    stock = load()
    pipe = StableDiffusionInstructPix2PixPipeline(**stock.components, requires_safety_checker=False)
    with pytest.raises(UserError, match=r"InstructPix2PixPipeline cannot draw for a user: .*XLInpaintPipeline"):
        load_psa(pipe, folder())


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@FAMILY
def test_images_are_redrawn_for_users(load: Make, folder: Make, users: Tensor, family: str, task: str):
    """The stock pipeline's image at scale 0; each row its own user's, the unconditional half the null user's."""
    import diffusers

    stock = load(family)
    kind = getattr(diffusers, f"StableDiffusion{'XL' if family == 'sdxl' else ''}{task}Pipeline")
    pipe = kind(**stock.components, **({"requires_safety_checker": False} if family == "sd" else {}))
    pipe.set_progress_bar_config(disable=True)
    given = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    options: dict[str, Any] = {"image": given, "strength": 0.9, "num_inference_steps": 3, "guidance_scale": 4.0}
    if task == "Inpaint":
        options |= {"mask_image": torch.ones(2, 1, 32, 32), "height": 32, "width": 32}

    def redraw(**own: Any) -> np.ndarray:
        generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(["a red cat", "a house"], generator=generator, output_type="np", **(options | own)).images

    plain = redraw()
    load_psa(pipe, folder(family), scale=0.0)
    np.testing.assert_array_equal(redraw(user=list(IDS)), plain)
    load_psa(pipe, folder(family))
    projection = UserAdapter.of(pipe.unet).projection
    seen = watch(pipe)
    drawn, turned = redraw(user=list(IDS)), redraw(user=list(reversed(IDS)))
    assert np.abs(drawn - plain).max() > 1e-3
    assert all(np.abs(drawn[row] - turned[row]).max() > 1e-4 for row in range(2))
    null = projection(users, torch.tensor([False, False]))
    close(seen[0], torch.cat([null, projection(users)]))
    unload_psa(pipe)
    assert type(pipe) is kind
    np.testing.assert_array_equal(redraw(), plain)


def test_pipelines_that_share_a_network(load: Make, folder: Make):
    """One made of a prepared pipeline draws for nobody until it is given users, and says so; then both do."""
    pipe = load()
    load_psa(pipe, folder())
    expected = draw(pipe, user=list(IDS))
    other: Any = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is StableDiffusionImg2ImgPipeline
    options = {"image": torch.rand(1, 3, 32, 32), "num_inference_steps": 2}
    with pytest.raises(UserError, match="was called without a user"):
        other("a red cat", **options)
    load_psa(other, folder())
    assert other("a red cat", user="anna", **options).images
    np.testing.assert_array_equal(draw(pipe, user=list(IDS)), expected)


def test_an_adapter_that_does_not_fit_leaves_the_old_one_in_place(load: Make, folder: Make, tmp_path: Path):
    """Otherwise whoever goes on after the error draws with the base model, without anybody's bounds."""
    pipe = load()
    load_psa(pipe, folder())
    expected = draw(pipe, user=list(IDS))
    (tmp_path / "psa_adapter.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match="torch file"):
        load_psa(pipe, tmp_path / "psa_adapter.bin")
    with pytest.raises(UserError, match=r"12 numbers.* 7"):
        load_psa(pipe, folder(embedding=7))
    with pytest.raises(UserError, match="scale nan"):
        load_psa(pipe, folder(), scale=float("nan"))
    np.testing.assert_array_equal(draw(pipe, user=list(IDS)), expected)


def test_attention_slicing_is_noticed(load: Make, folder: Make):
    pipe = load()
    load_psa(pipe, folder())
    pipe.enable_attention_slicing()
    with pytest.raises(UserError, match="was replaced by SlicedAttnProcessor"):
        draw(pipe, user="anna")
    unload_psa(pipe)  # and there is a way out
    assert np.isfinite(draw(pipe)).all()


def test_half_a_pipeline_keeps_the_projection_whole(load: Make, folder: Make):
    """Statistics of raw embeddings lose the users in bf16; the branch itself runs in the pipeline's precision."""
    pipe = load().to(torch.bfloat16)
    load_psa(pipe, folder())
    adapter = UserAdapter.of(pipe.unet)
    assert {t.dtype for t in adapter.projection.state_dict().values()} == {torch.float32}
    assert {p.dtype for layer in adapter.layers.values() for p in layer.parameters()} == {torch.bfloat16}
    assert np.isfinite(draw(pipe, user=list(IDS))).all()


def test_the_class_keeps_its_name_and_copies_work(load: Make, folder: Make):
    """Evaluation draws batches in parallel on shallow copies with schedulers of their own."""
    from lit_safety.drawing.threads import twin

    pipe = load()
    load_psa(pipe, folder())
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    np.testing.assert_array_equal(draw(twin(pipe), user=list(IDS)), draw(pipe, user=list(IDS)))
