from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_safety.attacks.lora_training import denoising_loss, encode_images, read_images
from lit_safety.attacks.soft_prompt import ConceptInversion, SoftPrompt, SoftTokens, train_tokens
from lit_safety.core.errors import UserError
from tests.attacks.conftest import DRAWING


def test_the_loss_falls_and_the_model_stays_as_it_is(make_target, pair_shards: Path) -> None:
    """The error on the attacker's images, at fixed noise and timesteps, is lower after 30 steps.

    The tiny random UNet hardly looks at its text, so its cross-attention's values are raised first.
    """
    network = make_target().network()
    backbone = network.backbone
    with torch.no_grad():
        for name, parameter in backbone.denoiser.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                parameter *= 30
    frozen = {name: p.detach().clone() for name, p in backbone.denoiser.named_parameters()}
    words = network.encoders()[0][1].get_input_embeddings().weight.detach().clone()
    tokens = SoftTokens(network, 1, 2, seed=0)
    found = [replace(p, prompt="<soft0> <soft1> a") for p in read_images(str(pair_shards), 2, True, "Test")]
    posterior = encode_images(backbone, found, 32)

    def error() -> float:
        with torch.no_grad(), tokens.trained():
            text = backbone.encode_text([p.prompt for p in found])
            keys = [p.key for p in found]
            return sum(float(denoising_loss(backbone, posterior, text, keys, 7, n).mean()) for n in range(4))

    before = error()
    for step, _ in train_tokens(network, tokens, found, [2], 4, 0.5, 0):
        if step == 30:
            break
    assert error() < 0.95 * before
    for name, parameter in backbone.denoiser.named_parameters():
        assert torch.equal(parameter, frozen[name]), name
    assert torch.equal(network.encoders()[0][1].get_input_embeddings().weight[: len(words)], words)


def test_written_tokens_read_as_those_in_training(make_target) -> None:
    network = make_target().network()
    tokens = SoftTokens(network, 2, 1, seed=0)
    assert tokens.names == [["<soft0>"], ["<soft1>"]]
    with torch.no_grad():
        tokens.tables[0] += 1.0
    text = ["<soft0> a cat", "<soft1> a cat"]
    with torch.no_grad():
        before = network.backbone.encode_text(text)["encoder_hidden_states"]
        with tokens.trained():
            trained = network.backbone.encode_text(text)["encoder_hidden_states"]
        tokens.write()
        written = network.backbone.encode_text(text)["encoder_hidden_states"]
    assert torch.equal(trained, written)
    assert not torch.equal(before, written)
    assert not torch.equal(written[0], written[1])


def test_stages_draw_each_prompt_with_the_tokens_of_its_concept(make_target, category_shards: Path, rows) -> None:
    prompts = [rows[0], replace(rows[1], category="hate"), replace(rows[0], seed=9)]
    target = make_target(prompts=prompts)
    attack = SoftPrompt(str(category_shards), steps=[1, 2], vectors=1, pictures=2, batch_size=1)
    stages = [(stage.budget, [p.prompt for p in stage.prompts]) for stage in attack.stages(target)]
    texts = ["<soft0> a gun", "<soft1> red gun", "<soft0> a gun"]
    assert stages == [(1, texts), (2, texts)]


def test_bad_input(make_target, category_shards: Path, rows) -> None:
    with pytest.raises(UserError, match=r"must hold \{tokens\}"):
        SoftPrompt("x", template="{prompt}")
    with pytest.raises(UserError, match=r"steps \[5, 5\]"):
        SoftPrompt("x", steps=[5, 5])
    target = make_target(prompts=[rows[0], replace(rows[1], category="shocking")])
    with pytest.raises(UserError, match="shocking"):
        next(iter(SoftPrompt(str(category_shards)).stages(target)))


def test_the_restart_with_the_lowest_loss_is_drawn(make_target, category_shards: Path, rows, monkeypatch) -> None:
    """Three restarts a concept start apart; of each concept the one is drawn whose loss on its images is lowest."""
    prompts = [rows[0], replace(rows[1], category="hate")]
    attack = ConceptInversion(str(category_shards), steps=[2], vectors=1, restarts=3, pictures=2, batch_size=1)
    made: list[SoftTokens] = []
    losses: list[float] = [3.0, 1.0, 2.0, 1.0, 1.5, 0.5]  # violence: the second, hate: the third

    def start(*given, **more):
        made.append(SoftTokens(*given, **more))
        return made[-1]

    def loss(backbone, posterior, text, keys, seed, step):
        if step > 0:
            return denoising_loss(backbone, posterior, text, keys, seed, step)
        return torch.tensor(losses).repeat_interleave(2)

    monkeypatch.setattr("lit_safety.attacks.soft_prompt.SoftTokens", start)
    monkeypatch.setattr("lit_safety.attacks.soft_prompt.denoising_loss", loss)
    (stage,) = attack.stages(make_target(prompts=prompts, drawing=replace(DRAWING, batch_size=16)))
    assert [p.prompt for p in stage.prompts] == ["<soft1> a gun", "<soft5> red gun"]
    table = made[0].tables[0].detach()
    apart = (table[:, None] - table).norm(dim=-1)
    assert float(apart[~torch.eye(6, dtype=torch.bool)].min()) > 0


def test_a_long_prompt_makes_room_for_the_vectors_and_that_is_said(make_target, category_shards: Path, rows) -> None:
    """16 places, 2 of them for start and end and 8 for the vectors: three of four words of two letters stay."""
    target = make_target(prompts=[replace(rows[0], prompt="a gun red cat")])
    attack = ConceptInversion(str(category_shards), steps=[1], restarts=1, pictures=1, batch_size=1)
    (stage,) = attack.stages(target)
    tokenizer = stage.pipe.tokenizer
    text = stage.prompts[0].prompt
    assert len(tokenizer(text)["input_ids"]) <= tokenizer.model_max_length
    assert text.split()[:8] == [f"<soft{n}>" for n in range(8)]
    assert text.split()[8:] == ["a", "gun", "red", "cat"][: len(text.split()) - 8]
    assert "1 of 1 prompts lost" in target.notes[0]
    with pytest.raises(UserError, match="1 to 8"):
        ConceptInversion(str(category_shards), vectors=9)
