"""A user adapter as an arm of `evaluate`: for the null user, for a user, next to LoRAs and under a guard."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_safety.adapters import load_psa
from lit_safety.adapters.user_file import is_user_adapter
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm, gather_arms
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from lit_safety.drawing.guards.safree import SAFREE
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt
from lit_safety.evaluation.command import evaluate
from tests.helpers.user_adapters import save_random_adapter, save_users
from tests.helpers.user_profiles import profile

SETTINGS = DrawingSettings(steps=2, device="cpu")
PROMPTS = [Prompt(text, "clean", "", "", (), False, seed) for seed, text in enumerate(("a car", "a tree", "a gun"))]


@pytest.fixture(scope="module")
def user_adapter(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random_adapter(pipeline, tmp_path_factory.mktemp("user-adapter") / "adapter")
    save_users(folder, [profile("anna"), profile("ben")])
    return folder


def for_users(*users: str | None) -> list[Prompt]:
    from dataclasses import replace

    return [replace(prompt, user=user) for prompt, user in zip(PROMPTS, users, strict=True)]


def test_a_batch_of_different_users(pipeline: Path, user_adapter: Path):
    """Each row is what it is alone with its user; None is the null user, as in load_psa's own call."""
    pipe = load_pipeline(pipeline, Arm(adapter=str(user_adapter)))
    both = draw_batch(pipe, for_users("anna", "ben", None), SETTINGS)
    for number, user in enumerate(("anna", "ben", None)):
        alone = pipe(
            PROMPTS[number].prompt, user=user, generator=torch.Generator().manual_seed(number), guidance_scale=3.0,
            num_inference_steps=2, output_type="np",
        ).images[0]  # fmt: skip
        np.testing.assert_allclose(both[number], alone, atol=1e-4)
    other = draw_batch(pipe, for_users("ben", "anna", None), SETTINGS)
    assert np.abs(other[:2] - both[:2]).max() > 1e-2
    np.testing.assert_allclose(other[2], both[2], atol=1e-4)


def test_loras_and_users_in_one_arm(pipeline: Path, adapter: Path, user_adapter: Path):
    """The same as a LoRA that stays unfused next to the user adapter, up to rounding; the LoRA counts."""
    arm = Arm(adapters={str(adapter): 1.0, str(user_adapter): 0.5})
    assert arm.loras() == {str(adapter): 1.0}
    assert arm.user_adapter() == (str(user_adapter), 0.5)
    found = draw_batch(load_pipeline(pipeline, arm), for_users("anna", "ben", None), SETTINGS)
    plain = load_pipeline(pipeline, Arm())
    plain.load_lora_weights(adapter)
    load_psa(plain, user_adapter, scale=0.5)
    np.testing.assert_allclose(draw_batch(plain, for_users("anna", "ben", None), SETTINGS), found, atol=1e-3)
    alone = draw_batch(
        load_pipeline(pipeline, Arm(adapter=str(user_adapter), scale=0.5)), for_users(*[None] * 3), SETTINGS
    )
    assert np.abs(draw_batch(plain, for_users(*[None] * 3), SETTINGS) - alone).max() > 1e-2


@pytest.mark.parametrize("guard", [SafeLatentDiffusion("max"), SAFREE(concepts=["gun"], reattention=True)])
def test_a_guard_and_users(pipeline: Path, user_adapter: Path, guard):
    """A guard that draws with a third row for each prompt gives that row the prompt's user; users stay apart."""
    pipe = load_pipeline(pipeline, Arm(adapter=str(user_adapter), guard=guard))
    users = ("anna", "ben", None)
    guarded = draw_batch(pipe, for_users(*users), SETTINGS, None, guard)
    assert np.isfinite(guarded).all()
    for number, user in enumerate(users):
        alone = draw_batch(pipe, [for_users(*[user] * 3)[number]], SETTINGS, None, guard)
        np.testing.assert_allclose(alone[0], guarded[number], atol=1e-3)


@pytest.mark.parametrize("task", ["image_to_image", "inpainting"])
def test_edits_are_for_users_too(pipeline: Path, user_adapter: Path, tmp_path: Path, task):
    """Each row is redrawn for its user, None being the null user; in the order of the batch."""
    from dataclasses import replace

    from PIL import Image

    from lit_safety.drawing.edits import Edit
    from lit_safety.drawing.gallery import Load

    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 40, 200 - 60 * number)).save(tmp_path / f"{number}.png")
    edited = replace(SETTINGS, edit=Edit(task, str(tmp_path), 0.9, "all"))
    arm = Arm(adapter=str(user_adapter))
    pipe = Load(pipeline, arm, edited)()
    drawn = {
        users: draw_batch(pipe, for_users(*users), edited)
        for users in ((None, None, None), ("anna", "ben", None), ("ben", "anna", None))
    }
    nobody, mixed, turned = drawn.values()
    assert np.abs(mixed[:2] - nobody[:2]).max() > 1e-4
    assert all(np.abs(mixed[row] - turned[row]).max() > 1e-4 for row in range(2))
    np.testing.assert_array_equal(mixed[2], nobody[2])


def test_aligned_is_drawn_for_the_null_user_and_an_arm_for_its_user(
    pipeline: Path, user_adapter: Path, prompts_csv: Path, tmp_path: Path, judge, monkeypatch
):
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: judge)
    arms = {"anna": Arm(adapter=str(user_adapter), user="anna"), "again": Arm(adapter=str(user_adapter))}
    evaluate(
        pipeline=str(pipeline), adapter=str(user_adapter), prompts=str(prompts_csv), judge="x", steps=2, device="cpu",
        out=str(tmp_path / "report"), arms=arms,
    )  # fmt: skip
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    settings = {name: arm["settings"].get("user") for name, arm in found["arms"].items()}
    assert settings["base"] is None
    assert settings["aligned"] == {"id": None, "sha256": None}
    assert settings["anna"]["id"] == "anna"
    images = {
        name: [p.read_bytes() for p in sorted((tmp_path / "report" / "images").glob(f"{name}-*/*.png"))]
        for name in found["arms"]
    }
    assert images["aligned"] == images["again"]
    assert not set(images["aligned"]) & {*images["base"], *images["anna"]}


def test_test_of_psa_judges_the_null_user(user_adapter: Path, pipeline: Path, tmp_path: Path, monkeypatch):
    """EvaluateOnTest writes the user adapter and hands it to `evaluate`, which draws for an unknown user."""
    from contextlib import nullcontext

    from lit_safety.callbacks import EvaluateOnTest
    from lit_safety.modules import PSA

    module = PSA(pretrained=str(pipeline), users=str(user_adapter))
    module._trainer = None
    module.configure_model()
    monkeypatch.setattr(module, "exporting", lambda _: nullcontext())
    asked: dict = {}
    found = {"arms": {"aligned": {"ip": 0.5}}}
    monkeypatch.setattr("lit_safety.evaluation.command.evaluate", lambda **given: asked.update(given) or found)
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    callback = EvaluateOnTest(prompts="p.csv", judge="j")
    callback.on_test_end(trainer, module)
    assert callback.metrics == found
    assert is_user_adapter(asked["adapter"])
    assert Path(asked["adapter"]) == tmp_path / "adapter"


def test_arms_of_users_on_the_command_line(user_adapter: Path):
    words = ["--arms.anna.adapter", str(user_adapter), "--arms.anna.user", "0000033", "--arms.anna.users=u"]
    assert json.loads(gather_arms(words)[0].partition("=")[2]) == {
        "adapter": str(user_adapter), "user": "0000033", "users": "u",
    }  # fmt: skip


def test_bad_arms_are_named(user_adapter: Path, adapter: Path, tmp_path: Path):
    given = str(user_adapter)
    for arm, match in (
        (Arm(adapter=given, user="zoe"), "user 'zoe' is not in .*users.safetensors"),
        (Arm(adapter=given, user="anna", users=str(tmp_path)), "no users at"),
        (Arm(adapter=str(adapter), user="anna"), "lacks a user adapter"),
        (Arm(user="anna"), "lacks a user adapter"),
    ):
        with pytest.raises(UserError, match=match):
            arm.check("x")
    copy = save_random_adapter_twice(user_adapter, tmp_path)
    with pytest.raises(UserError, match="are both user adapters"):
        Arm(adapters={given: 1.0, str(copy): 1.0}).check("x")


def save_random_adapter_twice(user_adapter: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(user_adapter, folder / "copy"))


def test_which_files_are_user_adapters(user_adapter: Path, adapter: Path, tmp_path: Path):
    assert is_user_adapter(user_adapter)
    assert is_user_adapter(user_adapter / "user_adapter.safetensors")
    renamed = tmp_path / "other.safetensors"
    renamed.write_bytes((user_adapter / "user_adapter.safetensors").read_bytes())
    assert is_user_adapter(renamed)
    published = tmp_path / "published"
    published.mkdir()
    (published / "psa_adapter.bin").write_bytes(b"x")
    assert is_user_adapter(published)
    assert not is_user_adapter(adapter)
    assert not is_user_adapter(tmp_path / "absent")
    (published / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds both psa_adapter\.bin and pytorch_lora"):
        is_user_adapter(published)


def test_a_torch_file_is_what_its_content_says_whatever_its_name(
    user_adapter: Path, adapter: Path, pipeline: Path, tmp_path: Path
):
    """A LoRA's `.bin` is not a user adapter: the message says how to convert it, and the result can be used."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    from lit_safety.adapters.user_file import load_user_adapter, save_published

    unet = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None).unet
    written = save_published(load_user_adapter(unet, save_random_adapter(pipeline, tmp_path / "own", tokens=1)),
                             tmp_path / "psa_adapter.bin")  # fmt: skip
    for name in ("users.bin", "users.pt", "pytorch_lora_weights.bin"):
        copy = tmp_path / name
        copy.write_bytes(written.read_bytes())
        assert is_user_adapter(copy), name
        load_pipeline(pipeline, Arm(adapter=str(copy)))
    for name in ("psa_adapter.bin", "pytorch_lora_weights.bin"):
        lora = tmp_path / "lora" / name
        lora.parent.mkdir(exist_ok=True)
        torch.save(load_file(adapter / "pytorch_lora_weights.safetensors"), lora)
        arm = Arm(adapter=str(lora))
        arm.check("x")
        assert list(arm.loras()) == [str(lora)]
        with pytest.raises(UserError, match=r"safetensors.*python -c") as error:
            load_pipeline(pipeline, arm)
        code = str(error.value).split('"')[1]
        exec(code, {})
        load_pipeline(pipeline, Arm(adapter=str(lora.with_suffix(".safetensors"))))
    for name, content in (("old.bin", b"\x80\x02junk"), ("not.bin", b"junk"), ("zip.bin", b"PK\x03\x04junk")):
        (tmp_path / name).write_bytes(content)
        assert not is_user_adapter(tmp_path / name)


def test_a_folder_with_a_pickled_lora_says_how_to_convert_it(pipeline: Path, tmp_path: Path):
    torch.save({"unet.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.bin.*python -c"):
        load_pipeline(pipeline, Arm(adapter=str(tmp_path)))
