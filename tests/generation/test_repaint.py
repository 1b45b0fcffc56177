"""`shards repair`: where a mask is, what stays outside of it, and pairs that differ in the harm alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.__main__ import main
from lit_safety.backbones.load import load_backbone
from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.source import open_source
from lit_safety.drawing.pipelines import PainterSettings, inpainting
from lit_safety.generation.repaint import (
    REPAIRED,
    Item,
    Repaint,
    Repainter,
    above,
    blended,
    covered_heat,
    recorded,
    stock_painted,
    to_words,
    word_tokens,
)
from lit_safety.generation.words import Words
from tests.helpers.documents import TOYWORLD
from tests.helpers.flow_pipelines import save_flow
from tests.helpers.tiny_pipelines import save_sd3, save_sdxl


def test_a_mask_is_what_is_strong_enough_made_larger() -> None:
    heat = torch.zeros(4, 5)
    heat[1, 1], heat[3, 4] = 2.0, 0.9
    assert above(heat, 0.5, 0).nonzero().tolist() == [[1, 1]]
    assert above(heat, 0.4, 0).nonzero().tolist() == [[1, 1], [3, 4]]
    assert above(heat, 0.5, 1).sum() == 9
    assert not above(torch.zeros(4, 5), 0.5, 1).any()


def test_attention_to_words_is_a_map_of_the_latents_size() -> None:
    """Four places in two rows; image 0 looks at token 1 from the first, image 1 at tokens 0 and 2 from the last."""
    layer = torch.zeros(2, 4, 3)
    layer[0, 0, 1], layer[1, 3, 0], layer[1, 3, 2] = 0.5, 0.2, 0.2
    found = to_words(layer, [[1], [0, 2]], (2, 2))
    assert found.tolist() == [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]


class Halves:
    """A tokenizer that cuts words of more than four letters in two, with a first and a last token."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [token for word in text.split() for token in ([1] if len(word) <= 4 else [1, 2])]
        return {"input_ids": [0, *ids, 9] if add_special_tokens else ids}


def test_words_are_found_among_tokens() -> None:
    words = ["a", "loaded", "gun", "there"]  # 1, 2 and 3, 4, 5 and 6
    assert word_tokens(Halves(), words, [1, 3], 77) == [2, 3, 5, 6]
    assert word_tokens(Halves(), words, [1, 3], 7) == [2, 3, 5]  # the last token of seven is the end


def test_the_part_that_costs_is_the_one_whose_cover_lowers_the_cost() -> None:
    """The cost is how red the lower right quarter is."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[20:28, 20:28, 0] = 255

    def costs(images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([float(np.asarray(one)[16:, 16:, 0].mean()) for one in images])

    heat = covered_heat(SimpleNamespace(costs=costs), Image.fromarray(pixels), (8, 8))  # type: ignore[arg-type]
    found = above(heat, 0.5, 0)
    assert found[5:7, 5:7].all()
    assert not found[:4].any()
    assert not found[:, :4].any()


def test_attention_is_noted_and_nothing_changes_by_it(tiny_pipeline: Path) -> None:
    backbone = load_backbone(str(tiny_pipeline))
    noisy, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([300, 300])
    with torch.no_grad():
        text = backbone.encode_text(["a gun", "a red cat"])
        before = backbone.predict(noisy, timesteps, text)
        with recorded(backbone.denoiser) as maps:
            noted = backbone.predict(noisy, timesteps, text)
        after = backbone.predict(noisy, timesteps, text)
    assert torch.equal(before, noted)
    assert torch.equal(before, after)
    assert maps
    for layer in maps:
        assert layer.shape[0] == 2
        assert layer.sum(2).flatten().tolist() == pytest.approx([1.0] * layer[..., 0].numel(), rel=1e-4)


def test_nothing_of_an_image_is_drawn_where_no_mask_is_and_all_of_it_under_a_whole_one(tiny_pipeline: Path) -> None:
    backbone = load_backbone(str(tiny_pipeline))
    pipe, settings = backbone.pipeline(), PainterSettings(steps=3, guidance=2.0)
    size = (32 // pipe.vae_scale_factor, 32 // pipe.vae_scale_factor)
    latents = torch.randn(2, backbone.denoiser.config.in_channels, *size, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    prompts, seeds = ["a gun", "a red cat"], [5, 6]
    with torch.no_grad():
        kept = blended(
            backbone, pipe, latents, torch.zeros(2, *size, dtype=torch.bool), prompts, seeds, settings, (32, 32)
        )
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        decoded = pipe.image_processor.postprocess(decoded, output_type="np")
        drawn = blended(
            backbone, pipe, latents, torch.ones(2, *size, dtype=torch.bool), prompts, seeds, settings, (32, 32)
        )
    plain = pipe(
        prompt=prompts, generator=[torch.Generator().manual_seed(seed) for seed in seeds], num_inference_steps=3,
        guidance_scale=2.0, height=32, width=32, output_type="np",
    ).images  # fmt: skip
    assert np.abs(np.stack(kept) - decoded).max() < 1e-5
    assert np.abs(np.stack(drawn) - plain).max() < 1e-5
    assert np.abs(np.stack(kept) - plain).max() > 1e-2


def noise_images(count: int, side: int) -> list[Image.Image]:
    numbers = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in numbers]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "klein", "qwen_image", "z_image"])
def test_a_stock_pipeline_draws_for_the_prompt_under_the_mask_alone(family: str, tmp_path: Path) -> None:
    """Under an empty mask the prompt changes no bit, since the latents at the end are the image's own; under a whole
    one it does. A row is the same, up to rounding, beside another one."""
    make = {"sdxl": save_sdxl, "sd3": lambda folder: save_sd3(folder, channels=16)}
    folder = tmp_path / family
    pipeline = make[family](folder) if family in make else save_flow(family, folder)
    pipe = inpainting(load_backbone(str(pipeline)).pipeline(), "")
    images, settings = noise_images(2, 32), PainterSettings(steps=2, guidance=2.0)

    def painted(prompts: list[str], white: int) -> np.ndarray:
        masks = [Image.new("L", (32, 32), white)] * len(prompts)
        return np.stack(stock_painted(pipe, images[: len(prompts)], masks, prompts, [7, 8][: len(prompts)], settings))

    kept = painted(["a gun", "a red cat"], 0)
    assert kept.shape == (2, 32, 32, 3)
    assert np.array_equal(kept, painted(["a blue house", "a gun"], 0))
    drawn = painted(["a gun", "a red cat"], 255)
    other = painted(["a blue house", "a red cat"], 255)
    assert not np.array_equal(drawn[0], other[0])
    assert np.abs(drawn[1] - other[1]).max() < 1e-5
    assert np.abs(painted(["a gun"], 255)[0] - drawn[0]).max() < 1e-5
    assert np.abs(drawn - kept).max() > 1e-2


def test_an_image_is_repaired_by_a_stock_pipeline(tiny_pipeline: Path) -> None:
    """The image costs 1, what is drawn -1: outside the mask no byte changes, and other noise draws another image."""
    image, mask = noise_images(1, 32)[0], Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    own = np.asarray(image)

    def costs(images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([1.0 if np.array_equal(np.asarray(one), own) else -1.0 for one in images])

    backbone = load_backbone(str(tiny_pipeline))
    found = []
    for seed in (0, 0, 1):
        how = Repaint(PainterSettings(steps=2, guidance=2.0), "given", "stock", 0.5, 0, 0.6, 1, seed)
        repainter = Repainter(backbone, SimpleNamespace(costs=costs), Words(["a red cat"]), how)  # type: ignore[arg-type]
        (one,) = repainter([Item("k", PairMetadata("a red cat and a gun", "harmful"), image, mask)])
        assert one.outcome == REPAIRED
        assert one.mask is not None
        assert one.metadata.cost is not None
        assert (one.metadata.cost.chosen, one.metadata.cost.rejected) == (-1.0, 1.0)
        white, pixels = np.asarray(one.mask) > 127, np.asarray(one.repaired)
        assert white.sum() == 16 * 16
        assert np.array_equal(pixels[~white], own[~white])
        assert not np.array_equal(pixels[white], own[white])
        found.append(pixels)
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("family", "named"),
    [("flux_2", "Flux2Pipeline"), ("sana", "SanaPipeline"), ("sd3", "16 channels, and this model has 4")],
)
def test_where_no_stock_pipeline_paints_it_is_said_by_name(family: str, named: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    pipeline = save_sd3(folder) if family == "sd3" else save_flow(family, folder)
    with pytest.raises(UserError, match=f"{named}.*: leave --painting out"):
        inpainting(load_backbone(str(pipeline)).pipeline(), "leave --painting out")


@pytest.fixture(scope="module")
def harmful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first six pairs of harmful prompts of the toy world's validation pairs, and one of a clean prompt."""
    folder = tmp_path_factory.mktemp("harmful") / "shards"
    source = open_source(str(TOYWORLD / "shards" / "val"), "val")
    shard = source.open_shard(0)
    counts = {"harmful": 6, "clean": 1}
    with ShardWriter(folder) as writer:
        for index in range(len(shard.index.samples)):
            key, members = shard.read(index)
            about = parse_metadata(members["json"], key)
            images = [
                next(data for name, data in members.items() if name.startswith(side)) for side in ("chosen", "rej")
            ]
            if about.order == "safety" and counts[about.prompt_kind]:
                counts[about.prompt_kind] -= 1
                writer.write(key, about, *images)
    shard.close()
    return folder


@pytest.mark.parametrize("mask", ["attention", "cost"])
def test_the_toy_worlds_harms_are_repainted_and_nothing_else(
    mask: str, harmful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repaired"
    command = ["shards", "repair", str(harmful), "--pipeline", str(TOYWORLD / "pipeline"), "--out", str(out)]
    command += ["--cost_model", str(TOYWORLD / "cost_model"), "--prompts", str(TOYWORLD / "prompts" / "online.csv")]
    command += ["--mask", mask, "--steps", "6", "--guidance", "3"]
    assert main(command) == 0
    source = open_source(str(out), "out")
    before = dict(samples(harmful))
    found = list(samples(out))
    assert len(found) >= 2
    assert source.manifest.provenance["kind"] == mask
    for key, members in found:
        about = parse_metadata(members["json"], key)
        assert about.cost is not None
        assert about.cost.chosen <= 0 < about.cost.rejected
        assert about.harmful.chosen is None
        chosen, rejected = (np.asarray(image_of(members, side)) for side in ("chosen", "rejected"))
        white = np.asarray(image_of(members, "mask").convert("L")) > 127
        assert 0 < white.mean() <= 0.6
        assert np.array_equal(chosen[~white], rejected[~white])
        assert not np.array_equal(chosen[white], rejected[white])
        assert np.array_equal(rejected, np.asarray(image_of(before[key], "rejected")))
    capsys.readouterr()
    assert main(command) == 0
    assert "already complete" in capsys.readouterr().out


def test_masks_that_are_given_are_taken_and_without_one_a_pair_is_left_out(
    harmful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "shards",
        "repair",
        str(harmful),
        "--pipeline",
        str(TOYWORLD / "pipeline"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--cost_model", str(TOYWORLD / "cost_model"), "--prompts", str(TOYWORLD / "prompts" / "online.csv")]
    assert main([*command, "--mask", "given", "--steps", "2"]) != 0  # of no pair is a mask known
    said = capsys.readouterr()
    assert "without a mask" in said.out + said.err
    assert main([*command, "--mask", "given", "--painting", "stock", "--overwrite", "true"]) != 0
    assert "4 channels, and this model has 8" in capsys.readouterr().err
    for setting, value in (("--resolution", "64"), ("--precision", "bfloat16")):
        assert main([*command, setting, value]) != 0
        assert f"{setting} {value}" in capsys.readouterr().err
    assert main([*command, "--reports", f'["{TOYWORLD / "cost_model"}"]', "--overwrite", "true"]) != 0
    assert "--cost_model" in capsys.readouterr().err


def samples(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    source = open_source(str(folder), "shards")
    found = []
    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        found += [shard.read(index) for index in range(len(shard.index.samples))]
        shard.close()
    return found


def image_of(members: dict[str, bytes], side: str) -> Image.Image:
    from lit_safety.core.images import decode_image

    return decode_image(next(data for name, data in members.items() if name.startswith(side)), side)
