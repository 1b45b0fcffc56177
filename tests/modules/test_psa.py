import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from lit_safety.adapters import LoRA, load_psa
from lit_safety.adapters.user_file import to_published
from lit_safety.callbacks import ExportUserAdapter
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import PSA, SelectiveBackward
from lit_safety.objectives import DSPO, DiffusionDPO
from lit_safety.users.table import write_users

USERS = {f"u{i}": torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(4)}


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the embeddings of u0 to u3, 6 numbers each."""
    return write_users(tmp_path_factory.mktemp("users"), USERS).parent


@pytest.fixture
def module(tiny_pipeline: Path, users: Path) -> PSA:
    torch.manual_seed(0)
    made = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(users))
    made.configure_model()
    return made


def moved(module: PSA) -> PSA:
    generator = torch.Generator().manual_seed(7)
    for _, parameter in module.trainable_parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return module


def batch_of(size: int = 4, harmful: tuple[float, float] = (1.0, 0.0)) -> PairBatch:
    """Pairs of the users in turn; the chosen image is black, the rejected white."""
    return PairBatch(
        keys=[f"{row:04d}" for row in range(size)], seeds=[1000 + row for row in range(size)],
        prompts=["a gun and a house"] * size, prompt_kinds=["harmful"] * size, categories=[("violence",)] * size,
        orders=["composite"] * size, chosen=torch.full((size, 3, 32, 32), -1.0), rejected=torch.ones(size, 3, 32, 32),
        clean=torch.zeros(size), harmful=torch.tensor([harmful] * size), cost=torch.zeros(size, 2),
        has_cost=[True] * size, score=torch.zeros(size, 2), has_score=[True] * size,
        has_harmful=[not any(math.isnan(one) for one in harmful)] * size,
        user_ids=[f"u{row % 4}" for row in range(size)],
    )  # fmt: skip


def test_the_margin_is_exactly_zero_at_the_start_and_only_user_attention_is_trained(module: PSA):
    batch = batch_of()
    output = module.loss(module.errors(batch), batch)
    assert (output.logs["rewards/margins"] == 0).all()
    names = [name for name, _ in module.trainable_parameters()]
    assert all("user" in name for name in names)
    assert any(name.endswith("to_k_user.weight") for name in names)
    output.loss.mean().backward()
    assert all(p.grad is not None for _, p in module.trainable_parameters())


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_users_keys_learn_from_the_second_step_on(tiny_pipeline: Path, users: Path, tokens: int):
    """W'v is 0 at first, so nothing that is attended to matters: W'k's gradient is exactly 0, and so is that of the
    tokens. One step moves W'v. From then on W'k learns, but for one token, over which softmax is always 1."""
    torch.manual_seed(0)
    module = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(users), user_tokens=tokens)
    module.configure_model()
    optimizer = torch.optim.AdamW([p for _, p in module.trainable_parameters()], lr=1e-3)
    layers = list(module.adapter.layers.values())
    for step in range(2):
        optimizer.zero_grad()
        batch = batch_of()
        module.loss(module.errors(batch), batch).loss.mean().backward()
        for layer in layers:
            assert layer.to_v_user.weight.grad is not None
            assert layer.to_v_user.weight.grad.abs().sum() > 0
            keys = layer.to_k_user.weight.grad
            if tokens == 1:
                assert keys is None
                assert not layer.to_k_user.weight.requires_grad
            else:
                assert keys is not None
                assert bool(keys.any()) == (step == 1)
        projected = module.adapter.projection.linear.weight.grad
        assert projected is not None
        assert bool(projected.any()) == (step == 1)
        optimizer.step()


def test_each_pair_sees_its_own_user(module: PSA):
    """A batch's errors are those of its pairs one by one, and another user gives other errors."""
    moved(module)
    batch = batch_of()
    errors = module.errors(batch)
    alone = module.errors(batch_of(1))
    torch.testing.assert_close(errors.policy_chosen[:1], alone.policy_chosen, rtol=1e-4, atol=1e-6)
    other = module.errors(replace(batch, user_ids=["u1", "u0", "u3", "u2"]))
    assert (other.policy_chosen != errors.policy_chosen).all()
    assert torch.equal(other.reference_chosen, errors.reference_chosen)


def test_the_reference_is_the_base_model(module: PSA, tiny_pipeline: Path):
    """The same pairs, timesteps and noise through a denoiser that never had user attention."""
    moved(module)
    batch = batch_of()
    noisy, timesteps, target, _ = module.noised(batch)
    base: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    with torch.no_grad():
        text = module.encode_text(batch.prompts)["encoder_hidden_states"].repeat(2, 1, 1)
        expected = (base.unet(noisy, timesteps, text).sample - target).square().flatten(1).mean(1)
    errors = module.errors(batch)
    found = torch.cat([errors.reference_chosen, errors.reference_rejected])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_embeddings_are_standardised_over_the_training_users(module: PSA):
    table = torch.stack(list(USERS.values()))
    torch.testing.assert_close(module.adapter.projection.mean, table.mean(0))
    torch.testing.assert_close(module.adapter.projection.std, table.std(0))


@pytest.mark.parametrize(
    ("harmful", "turned"),
    [((1.0, 0.0), True), ((0.0, 1.0), False), ((0.0, 0.0), False), ((1.0, 1.0), False), ((math.nan, 0.0), False)],
)
def test_the_null_user_prefers_the_safe_image(module: PSA, harmful: tuple[float, float], turned: bool):
    """White, the rejected image, becomes the chosen one where it alone is safe; a user's own order stays."""
    batch = replace(batch_of(2, harmful), user_ids=[None, "u1"])
    ordered = module.ordered(batch)
    assert ordered.chosen is not None
    assert ordered.chosen[:, 0, 0, 0].tolist() == [1.0 if turned else -1.0, -1.0]
    labels = module.labels(ordered)
    expected = [list(reversed(harmful)) if turned else list(harmful), list(harmful)]
    torch.testing.assert_close(labels.harmful, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("selective", [None, SelectiveBackward(threshold=1e9, least=1.0)], ids=["whole", "selective"])
def test_a_step_puts_its_pairs_in_order_once(
    module: PSA, monkeypatch: pytest.MonkeyPatch, selective: SelectiveBackward | None
):
    """In training and in validation; what is computed on the batch is of the null user's order."""
    module.speed.selective = selective
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(module, "chosen_users", lambda batch: [None] * len(batch))
    given, read = [], []
    ordered, labels = module.ordered, module.labels
    monkeypatch.setattr(module, "ordered", lambda batch: given.append(batch) or ordered(batch))
    monkeypatch.setattr(module, "labels", lambda batch: read.append(batch.harmful.tolist()) or labels(batch))
    batch = batch_of(2, (1.0, 0.0))
    module.training_step(batch, 0)
    assert [one is batch for one in given] == [True]
    module.validation_step(batch, 0)
    assert [one is batch for one in given] == [True, True]
    assert all(harmful == [[0.0, 1.0]] * 2 for harmful in read)


def test_users_and_prompts_are_dropped_as_often_as_asked_and_by_the_sample_alone(tiny_pipeline: Path, users: Path):
    """0.3 null user, of which 0.1 without a prompt too; in other company the same choice; never in evaluation."""
    module = PSA(str(tiny_pipeline), users=str(users), user_dropout=0.2, joint_dropout=0.1)
    batch = replace(batch_of(1), seeds=list(range(20_000)), user_ids=["u0"] * 20_000, keys=["k"] * 20_000)
    module.train()
    nobody = np.array([user is None for user in module.chosen_users(batch)])
    empty = np.array(module.dropped_prompts(batch))
    assert nobody.mean() == pytest.approx(0.3, abs=0.015)
    assert empty.mean() == pytest.approx(0.1, abs=0.01)
    assert not (empty & ~nobody).any()
    one = replace(batch, seeds=[17], user_ids=["u0"], keys=["k"])
    assert (module.chosen_users(one)[0] is None) == nobody[17]
    module.eval()
    assert module.chosen_users(batch) == batch.user_ids
    assert not any(module.dropped_prompts(batch))


def test_prompt_and_user_are_dropped_as_guidance_uses_them(tiny_pipeline: Path, users: Path):
    """What a doubly dropped pair sees is the pipelines' unconditional half: the empty prompt and the null user."""
    module = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(users), user_dropout=0, joint_dropout=0.999)
    module.configure_model()
    moved(module).train()
    conditioning: Any = module.noised(batch_of(1))[3]
    empty = module.encode_text([""])["encoder_hidden_states"]
    assert torch.equal(conditioning["encoder_hidden_states"], empty.repeat(2, 1, 1))
    projection = module.adapter.projection
    null = projection.norm(projection.null_tokens)
    torch.testing.assert_close(conditioning["cross_attention_kwargs"]["user_tokens"], torch.stack([null, null]))


def test_without_prompt_and_user_the_policy_is_held_to_the_reference(tiny_pipeline: Path, users: Path):
    """Loss of a pair that is dropped jointly: log 2 of the margin 0, SFT on the reference's error, and 3 * drift, which
    alone has a gradient. Without an anchor such pairs prefer the safe image as the null user's do."""
    objective = DiffusionDPO(beta=200.0, sft_weight=5.0, anchor_weight=3.0)
    module = PSA(str(tiny_pipeline), objective, users=str(users), user_dropout=0, joint_dropout=0.999)
    module.configure_model()
    moved(module).train()
    batch = batch_of(2, (1.0, 0.0))
    errors = module.errors(batch)
    assert errors.drift is not None
    assert (errors.drift > 1e-6).all()
    output = module.loss(errors, batch)
    expected = math.log(2) + 5.0 * errors.reference_chosen + 3.0 * errors.drift
    torch.testing.assert_close(output.loss, expected)
    (gradient,) = torch.autograd.grad(output.loss.sum(), errors.drift, retain_graph=True)
    torch.testing.assert_close(gradient, torch.full((2,), 3.0))
    assert not errors.policy_chosen.requires_grad or torch.equal(errors.policy_chosen, errors.reference_chosen)
    free = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(users), user_dropout=0, joint_dropout=0.999)
    free.configure_model()
    moved(free).train()
    found = free.errors(batch)
    assert (found.policy_chosen - found.reference_chosen).abs().min() > 1e-6
    module.eval()
    assert (module.errors(batch).policy_chosen - errors.reference_chosen).abs().min() > 1e-6


def test_training_pairs_of_nobody_are_refused_before_a_model_is_loaded(
    tiny_pipeline: Path, users: Path, tmp_path: Path
):
    with ShardWriter(tmp_path / "plain") as writer:
        about = {"prompt": "x", "prompt_kind": "harmful", "order": "safety"}
        about |= {"harmful": {"chosen": False, "rejected": True}}
        writer.write("0", about, *[Image.new("RGB", (32, 32))] * 2)
    module = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(users))
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"data.init_args.train: .*user_id"):
        trainer.fit(module, datamodule=PreferenceDataModule(str(tmp_path / "plain"), batch_size=1))
    assert "backbone" not in module._modules


def test_pairs_without_user_cannot_be_held_where_the_loss_itself_reads_the_drift():
    with pytest.raises(ValueError, match="joint_dropout"):
        PSA("x", DSPO(anchor_weight=1.0), joint_dropout=0.1)
    PSA("x", DSPO(anchor_weight=1.0), joint_dropout=0.0)
    PSA("x", DSPO(), joint_dropout=0.1)


def test_a_lora_is_trained_with_it_and_is_no_part_of_the_reference(tiny_pipeline: Path, users: Path, tmp_path: Path):
    """At the start policy and reference are equal to the bit; afterwards the reference is the base still."""
    lora = LoRA(rank=2, target_modules=["to_q", "ff.net.2"])
    module = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(users), lora=lora, joint_dropout=0.0)
    module.configure_model()
    names = [name for name, _ in module.trainable_parameters()]
    assert any(".lora_A.policy." in name for name in names)
    assert any("to_v_user" in name for name in names)
    batch = batch_of(2)
    start = module.errors(batch)
    assert torch.equal(start.policy_chosen, start.reference_chosen)
    for name, parameter in module.trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    later = module.errors(batch)
    assert torch.equal(later.reference_chosen, start.reference_chosen)
    assert not torch.equal(later.policy_chosen, start.policy_chosen)
    module.save_export(tmp_path)
    again = PSA(str(tiny_pipeline), users=str(users), lora=lora, start_from=str(tmp_path))
    again.configure_model()
    assert torch.equal(again.errors(batch).policy_chosen, later.policy_chosen)


def test_bad_users_are_named(tiny_pipeline: Path, users: Path, tmp_path: Path, module: PSA):
    with pytest.raises(UserError, match=r"user 'nobody' is not in .*users\.safetensors"):
        module.errors(replace(batch_of(1), user_ids=["nobody"]))
    write_users(tmp_path, {"a": torch.zeros(5), "b": torch.ones(5)})
    for given, match in (
        ([str(users), str(tmp_path)], "numbers"),
        ([], "empty"),
        (None, "needs its users' embeddings"),
    ):
        with pytest.raises(UserError, match=match):
            PSA(str(tiny_pipeline), users=given).configure_model()
    for wrong in ({"user_tokens": 0}, {"user_dropout": -0.1}, {"user_dropout": 0.5, "joint_dropout": 0.5}):
        with pytest.raises(ValueError, match="user"):
            PSA(str(tiny_pipeline), **wrong)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four pairs, each of one of the users, with the users next to them."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for i in range(8):
            images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
            metadata = {
                "prompt": "a gun and a house", "prompt_kind": "harmful", "categories": ["violence"],
                "harmful": {"chosen": True, "rejected": False}, "order": "composite", "user_id": f"u{i % 4}",
            }  # fmt: skip
            writer.write(f"{i:05d}", metadata, *images)
    write_users(folder, USERS)
    return folder


def test_a_fit_with_a_user_who_has_no_embedding_stops_before_its_first_step(
    tiny_pipeline: Path, shards: Path, tmp_path: Path
):
    write_users(tmp_path, {user: USERS[user] for user in ("u0", "u1", "u3")})
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    data = PreferenceDataModule(train=str(shards), batch_size=4)
    with pytest.raises(UserError, match=r"train: holds pairs of user 'u2', who is not in .*users embed"):
        trainer.fit(PSA(str(tiny_pipeline), users=str(tmp_path)), datamodule=data)
    assert data.users("fit") == {"data.init_args.train": frozenset(USERS)}
    without = PreferenceDataModule(train=str(shards), users=["u0", "u1"], batch_size=4)
    assert without.users("fit") == {"data.init_args.train": frozenset({"u0", "u1"})}


def test_pairs_that_are_not_there_are_named_with_the_command_that_makes_them(tiny_pipeline: Path, tmp_path: Path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
    data = PreferenceDataModule(train=str(tmp_path / "users" / "train"), batch_size=4)
    with pytest.raises(UserError, match=r"users/train does not exist.*`python -m lit_safety toyworld users`"):
        trainer.fit(PSA(str(tiny_pipeline)), datamodule=data)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_fit_leaves_an_adapter_that_draws_as_the_module_does(
    tiny_pipeline: Path, shards: Path, tmp_path: Path, tokens: int
):
    """From the users next to the shards to stock pipelines, with the file of the published layout for one token."""
    seed_everything(0)
    module = PSA(
        str(tiny_pipeline), DiffusionDPO(beta=200.0), user_tokens=tokens,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    )  # fmt: skip
    module.drawing.steps = 2
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_model_summary=False,
        callbacks=[ExportUserAdapter(published=tokens == 1)],
    )  # fmt: skip
    data = PreferenceDataModule(train=str(shards), val=str(shards), batch_size=4)
    trainer.fit(module, datamodule=data)
    out = tmp_path / "adapter"
    assert "u0" not in (out / "README.md").read_text()
    assert not (out / "users.safetensors").exists()
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)

    def drawn(user: str | None) -> np.ndarray:
        generator = [torch.Generator().manual_seed(3)]
        image = pipe(["a red cat"], user=user, num_inference_steps=2, guidance_scale=3.0, generator=generator)
        return np.asarray(image.images[0], dtype=float)

    load_psa(pipe, out, users=shards)
    for user in ("u2", None):
        expected = np.asarray(module.draw(["a red cat"], [3], [user])[0], dtype=float)
        np.testing.assert_allclose(drawn(user), expected, atol=1)
    if tokens == 1:
        found = torch.load(out / "psa_adapter.bin", weights_only=True)
        expected = to_published(module.adapter)
        torch.testing.assert_close(found["user_proj"], expected["user_proj"])
    else:
        with pytest.raises(UserError, match="one user token"):
            ExportUserAdapter(published=True).setup(trainer, module, "fit")

    # A checkpoint carries the statistics; a module that reads it draws the same for another set of users next to it.
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = PSA(str(tiny_pipeline), DiffusionDPO(beta=200.0), users=str(shards), user_tokens=tokens)
    other.configure_model()
    other.adapter.projection.mean.zero_()
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(other.adapter.projection.mean, module.adapter.projection.mean)
    other.drawing.steps = 2
    first, second = (one.draw(["a red cat"], [3], ["u1"])[0] for one in (module, other))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    with pytest.raises(UserError, match="no statistics of users"):
        other.on_load_checkpoint({key: value for key, value in checkpoint.items() if key != "user_statistics"})
