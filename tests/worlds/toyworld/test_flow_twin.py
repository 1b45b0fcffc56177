"""The flow twin: its networks before and after a training of seconds, and what the shipped one draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.backbones.load import load_backbone
from lit_safety.backbones.stable_diffusion_3 import count_missing_t5
from lit_safety.core.errors import UserError
from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.denoiser import take_average, train_networks, write_ids
from lit_safety.worlds.toyworld.drawing import draw, quiet
from lit_safety.worlds.toyworld.flow_twin import build_flow_twin
from lit_safety.worlds.toyworld.prompts import prompt_rows
from lit_safety.worlds.toyworld.text import tokenize
from lit_safety.worlds.toyworld.transformer import load_networks, towers, write_pipeline
from tests.helpers.documents import ROOT, TOYWORLD

TWIN = ROOT / "data" / "flowtwin"
CAPTIONS = ["a red cat in the park", "a gun on the beach", "a blue car and a yellow ball in the room", ""]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build's work folder as it is when the training begins: 8 images of noise with two captions each."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("twin")
    for name in ("vae", "text_encoder", "tokenizer"):
        (folder / name).symlink_to((TOYWORLD / "pipeline" / name).resolve())
    latents = np.random.default_rng(0).standard_normal((8, 8, 8, 8)).astype(np.float16)
    np.save(folder / "latents.npy", latents)
    ids = tokenize(CLIPTokenizer.from_pretrained(folder / "tokenizer"), CAPTIONS)
    write_ids(folder, ids[:2].expand(8, 2, -1), ids[3])
    return folder


def test_towers_read_the_toy_text_encoder_whole_and_its_first_layer(work: Path) -> None:
    """Of both, hidden_states[-2] is read: the last layer's output of the toy's in the one, its first layer's in the
    other; pooled is its end token's."""
    from transformers import CLIPTextModel, CLIPTokenizer

    ids = tokenize(CLIPTokenizer.from_pretrained(work / "tokenizer"), CAPTIONS)
    toy = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = toy(ids, output_hidden_states=True)
        for tower, layer in zip(towers(work / "text_encoder"), (2, 1), strict=True):
            found = tower(ids, output_hidden_states=True)
            assert torch.equal(found.hidden_states[-2], expected.hidden_states[layer])
        last, _ = towers(work / "text_encoder")
        torch.testing.assert_close(last(ids).text_embeds, expected.pooler_output)


def test_an_untrained_transformer_predicts_0(work: Path) -> None:
    """Its last layer is 0, so the loss is the mean of (noise - latents)^2."""
    networks, latents = load_networks(work), torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    loss = networks.loss(latents, torch.zeros(4, 16, dtype=torch.int64), torch.tensor([0.1, 0.4, 0.6, 0.9]))
    torch.manual_seed(3)
    expected = (torch.randn_like(latents) - latents).square().mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert {one.requires_grad for one in networks.text.parameters()} == {False}
    assert sum(p.numel() for p in networks.transformer.parameters()) == 3_608_672


def test_a_training_goes_on_where_it_was(work: Path) -> None:
    """Of a budget of two seconds, then of three: the second call has one left."""
    train_networks(work, load_networks, "transformer", 2 / 60, batch_size=4, world=1)
    first = torch.load(work / "transformer.pt", weights_only=True)
    train_networks(work, load_networks, "transformer", 3 / 60, batch_size=4, world=1)
    second = torch.load(work / "transformer.pt", weights_only=True)
    assert 1 <= first["step"] < second["step"]
    assert 2 <= first["spent"] < second["spent"]
    assert len(second["average"]) == len(list(load_networks(work).transformer.parameters()))  # no text tower's


def test_what_is_written_is_what_was_trained(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline of any averaged weights, in float16, predicts what the loss saw: 1.5% at most is rounding."""
    from transformers import CLIPTokenizer

    generator = torch.Generator().manual_seed(1)
    average = [
        p + 0.05 * torch.randn(p.shape, generator=generator) for p in load_networks(work).transformer.parameters()
    ]
    torch.save({"average": [one.detach() for one in average]}, work / "transformer.pt")
    write_pipeline(work, tmp_path / "pipeline")
    backbone = load_backbone(str(tmp_path / "pipeline"))
    assert type(backbone).__name__ == "StableDiffusion3"
    noisy, spread = torch.randn(4, 8, 8, 8, generator=generator), torch.tensor([0.1, 0.4, 0.6, 0.9])
    with torch.no_grad():
        predicted = backbone.predict(noisy, 1000 * spread, backbone.encode_text(CAPTIONS))
    networks = load_networks(work)
    take_average(networks, work / "transformer.pt")
    seen: list[torch.Tensor] = []
    networks.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].float()))
    ids = tokenize(CLIPTokenizer.from_pretrained(work / "tokenizer"), CAPTIONS)
    # x_t = (1 - sigma) 0 + sigma noise is `noisy` for this noise
    monkeypatch.setattr(torch, "randn_like", lambda like: noisy / spread.view(-1, 1, 1, 1))
    with torch.no_grad():
        networks.loss(torch.zeros_like(noisy), ids, spread)
    assert predicted.abs().mean() > 0.01
    difference = (predicted - seen[0]).square().mean().sqrt() / predicted.square().mean().sqrt()
    assert float(difference) < 0.015


def test_a_pipeline_that_is_there_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "pipeline").mkdir(parents=True)
    build_flow_twin(tmp_path / "out", tmp_path / "work", TOYWORLD / "pipeline")
    assert "is there" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    with pytest.raises(UserError, match=r"--toy .*vae"):
        build_flow_twin(tmp_path / "other", tmp_path / "work", tmp_path)


# ---- what is shipped


def test_the_shipped_twin_is_small_and_of_the_toy_world() -> None:
    from lit_safety.drawing.worlds import TOYWORLD as WORLD
    from lit_safety.drawing.worlds import vocabularies, world_of

    assert sum(file.stat().st_size for file in TWIN.rglob("*") if file.is_file()) <= 12_000_000
    assert vocabularies(TWIN / "pipeline") <= WORLD.marks
    world = world_of(TWIN)
    assert world is not None
    assert world.name == "toyworld"


def test_the_shipped_twin_draws_what_validation_prompts_ask_for() -> None:
    from diffusers import StableDiffusion3Pipeline

    torch.set_num_threads(1)
    pipeline = quiet(StableDiffusion3Pipeline.from_pretrained(TWIN / "pipeline", text_encoder_3=None, tokenizer_3=None))
    count_missing_t5(pipeline)
    rows = list(prompt_rows("val"))
    harmful = [row for row in rows if row["kind"] == "explicit"][:24:2]
    clean = [row for row in rows if row["kind"] == "clean"][:12]
    asked = harmful + clean
    images = draw(pipeline, [str(row["prompt"]) for row in asked], [int(row["seed"]) for row in asked], steps=12)
    judge = ToyJudge.from_pretrained(TOYWORLD / "judge")
    with torch.no_grad():
        found = judge(to_tensor(np.stack([np.asarray(p) for p in images]))).sigmoid() >= judge.threshold
    seen = [{label for label, there in zip(judge.labels, row, strict=True) if there} for row in found]
    assert sum(row["concept"] in labels for row, labels in zip(harmful, seen[:12], strict=True)) >= 11
    assert sum(set(str(row["benign"]).split(";")) <= labels for row, labels in zip(clean, seen[12:], strict=True)) >= 11
    assert sum(bool(labels & set(judge.harm)) for labels in seen[12:]) <= 1
