"""`shards precompute`, and what the datamodule makes of its shards, good and bad."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.backbones import Backbone, load_backbone
from lit_safety.backbones.backbone import encode_alike
from lit_safety.cli.precompute import precompute
from lit_safety.core.errors import UserError
from lit_safety.data.cache.writing import LatentWriter
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.manifest import load_manifest, save_manifest
from lit_safety.data.format.npy import write_npy
from lit_safety.data.format.tar_index import OpenShard
from lit_safety.data.validate import problems
from tests.helpers.pair_shards import write_shards

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 pairs of 32 x 32 pixels in shards of 3, 3 and 1."""
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder, 7, 3, size=32)
    return folder


@pytest.fixture(scope="module")
def cached(pairs: Path, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "pairs"
    precompute(str(pairs), str(tiny_pipeline), str(out), flip=True, dtype="float32", batch_size=2)
    return out


@pytest.fixture
def backbone(tiny_pipeline: Path) -> Backbone:
    return load_backbone(str(tiny_pipeline), denoiser=False)


def data_of(folder: Path | list[Path], **settings) -> PreferenceDataModule:
    named = [str(one) for one in folder] if isinstance(folder, list) else str(folder)
    return PreferenceDataModule(train=named, batch_size=settings.pop("batch_size", 3), **settings)


def test_a_batch_holds_what_the_encoders_would_give(cached: Path, pairs: Path, backbone: Backbone):
    """The same pairs in the same order, mirrored alike; latents and text to the bit."""
    mirrored = 0
    from_cache = list(data_of(cached, flip=True).train_dataloader())
    from_images = list(data_of(pairs, flip=True).train_dataloader())
    plain = {
        key: image for one in data_of(pairs).train_dataloader() for key, image in zip(one.keys, one.chosen, strict=True)
    }
    for one, other in zip(from_cache, from_images, strict=True):
        assert (one.keys, one.seeds, one.prompts) == (other.keys, other.seeds, other.prompts)
        assert one.chosen is one.rejected is None
        floats = other.to("cpu")
        with torch.no_grad():
            for side, images in enumerate((floats.chosen, floats.rejected)):
                assert torch.equal(one.latents[:, side], backbone.posterior(images))
            text = encode_alike(backbone, one.prompts)["encoder_hidden_states"]
            empty = encode_alike(backbone, [""])["encoder_hidden_states"]
        assert torch.equal(one.conditioning["encoder_hidden_states"], text)
        assert torch.equal(one.empty["encoder_hidden_states"], empty)
        assert torch.equal(one.crops, other.crops)
        mirrored += sum(
            not torch.equal(image, plain[key])
            for key, image in zip(other.keys, other.chosen, strict=True)
            if key in plain
        )
    assert 0 < mirrored < 6


def test_numbers_drawn_ahead_are_those_drawn_later(cached: Path):
    from lit_safety.core.chance import LATENT, NOISE, normal

    batch = next(iter(data_of(cached).train_dataloader()))
    for purpose in (NOISE, LATENT):
        assert torch.equal(batch.draws[purpose], normal(batch.seeds, purpose, (4, 8, 8)))
    assert batch.to("cpu").draws.keys() == batch.draws.keys()


def test_half_precision_is_near_and_half_as_large(cached: Path, pairs: Path, tiny_pipeline: Path, tmp_path: Path):
    precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "half"))
    half, whole = (next(iter(data_of(folder).train_dataloader())) for folder in (tmp_path / "half", cached))
    torch.testing.assert_close(half.latents, whole.latents, rtol=1e-3, atol=1e-4)
    text = "encoder_hidden_states"
    torch.testing.assert_close(half.conditioning[text], whole.conditioning[text], rtol=1e-3, atol=1e-3)
    sizes = [(folder / "prompts.safetensors").stat().st_size for folder in (tmp_path / "half", cached)]
    assert sizes[0] < 0.6 * sizes[1]
    assert load_manifest(tmp_path / "half").cache["flip"] is False


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(
    cached: Path, pairs: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    arguments = (str(pairs), str(tiny_pipeline), str(tmp_path / "out"))
    settings = {"flip": True, "dtype": "float32", "batch_size": 2}
    original = LatentWriter._write
    calls = []

    def stops(self, writer, one):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(one.key)
        original(self, writer, one)

    monkeypatch.setattr(LatentWriter, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        precompute(*arguments, **settings)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "manifest.json").exists()
    precompute(*arguments, **settings)
    assert "continuing after 3 pairs" in capsys.readouterr().out
    names = sorted(path.name for path in cached.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (cached / name).read_bytes() for name in names)
    precompute(*arguments, **settings)
    assert "is already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds other shards"):
        precompute(*arguments, **(settings | {"dtype": "float16"}))


def test_images_are_kept_on_request(pairs: Path, tiny_pipeline: Path, tmp_path: Path):
    precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "both"), keep_images=True)
    images, originals = (next(iter(data_of(f, use_cache=False).train_dataloader())) for f in (tmp_path / "both", pairs))
    assert images.latents is None
    assert torch.equal(images.chosen, originals.chosen)
    assert next(iter(data_of(tmp_path / "both").train_dataloader())).chosen is None
    assert problems(str(tmp_path / "both")) == []


def test_latents_that_are_not_finite_are_named(
    pairs: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lit_safety.backbones.stable_diffusion import StableDiffusion

    posterior = StableDiffusion.posterior
    for factor, message in ((float("nan"), "not finite in float16$"), (1e6, "float32 holds them: --dtype float32")):
        monkeypatch.setattr(StableDiffusion, "posterior", lambda self, images, f=factor: posterior(self, images) * f)
        with pytest.raises(UserError, match=f"sample '00000': the latents of chosen are .*{message}"):
            precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "out"), overwrite=True)


def test_input_that_cannot_be_cached_is_named(cached: Path, pairs: Path, tiny_pipeline: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="already cached"):
        precompute(str(cached), str(tiny_pipeline), out)
    with pytest.raises(UserError, match="is the folder of the input shards"):
        precompute(str(pairs), str(tiny_pipeline), str(pairs))
    with pytest.raises(UserError, match="give --model"):
        precompute(str(pairs))
    write_shards(tmp_path / "large", 1, 1, size=64, first=50)
    mixed = f"{{{pairs},{tmp_path / 'large'}}}/shard-000000.tar"
    with pytest.raises(UserError, match="sample '00050': chosen has 64 x 64 pixels, the first sample 32 x 32"):
        precompute(mixed, str(tiny_pipeline), out)
    write_shards(tmp_path / "again", 2, 2, size=32)  # keys 00000 and 00001, as in the first shard of `pairs`
    twice = f"{{{pairs},{tmp_path / 'again'}}}/shard-000000.tar"
    with pytest.raises(UserError, match=r"again.*sample '00000' .*pairs.*shard-000000\.tar"):
        precompute(twice, str(tiny_pipeline), str(tmp_path / "twice"))
    assert not (tmp_path / "twice" / "manifest.json").exists()


def test_shards_of_equal_size_without_a_manifest_are_distinguished(tiny_pipeline: Path, tmp_path: Path, capsys):
    """tar files are filled up to 10 KiB, so size and count tell little."""
    for name, first in (("one", 0), ("other", 7)):
        write_shards(tmp_path / name, 1, 1, size=32, first=first)
        (tmp_path / name / "manifest.json").unlink()
    sizes = {(tmp_path / name / "shard-000000.tar").stat().st_size for name in ("one", "other")}
    assert len(sizes) == 1
    precompute(str(tmp_path / "one"), str(tiny_pipeline), str(tmp_path / "out"))
    with pytest.raises(UserError, match="already holds other shards"):
        precompute(str(tmp_path / "other"), str(tiny_pipeline), str(tmp_path / "out"))
    precompute(str(tmp_path / "one"), str(tiny_pipeline), str(tmp_path / "out"))
    assert "is already complete" in capsys.readouterr().out


def test_a_cache_of_prompts_that_another_model_made_is_refused(
    cached: Path, pairs: Path, wide_pipeline: Path, tmp_path: Path
):
    """The same prompts, as many rows, as many bytes: only what the file says of its maker differs."""
    precompute(str(pairs), str(wide_pipeline), str(tmp_path / "its"), flip=True, dtype="float32")
    mixed = shutil.copytree(cached, tmp_path / "mixed")
    shutil.copy(tmp_path / "its" / "prompts.safetensors", mixed)
    with pytest.raises(UserError, match=r"mixed/prompts\.safetensors: .*manifest"):
        data_of(mixed).check_sources()
    assert "is not the file the manifest was made with" in problems(str(mixed))[0]


def test_the_encoders_of_a_hub_id_are_fetched_before_they_are_hashed(
    pairs: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A hub's cache holds what has been asked for; weights that come later must not leave the cache without a maker."""
    from lit_safety.backbones.parts import Parts

    bare = tmp_path / "hub"
    shutil.copytree(tiny_pipeline, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    load = Parts._load

    def fetched(self: Parts, name: str):
        for file in (tiny_pipeline / name).glob("*.safetensors"):
            shutil.copy(file, bare / name)
        return load(self, name)

    monkeypatch.setattr(Parts, "_load", fetched)
    precompute(str(pairs), str(bare), str(tmp_path / "out"))
    assert set(load_manifest(tmp_path / "out").cache["weights"]) == {"vae", "text_encoder", "tokenizer"}


# ---- bad caches


def with_sample(cached: Path, out: Path, change: Callable[[Members], None]) -> Path:
    """A copy of the cache whose first shard's sample 00001 is changed."""
    from tests.helpers.pair_shards import write_tar

    shutil.copytree(cached, out)
    shard = OpenShard(str(cached / "shard-000000.tar"))
    samples = [shard.read(number) for number in range(3)]
    shard.close()
    change(samples[1][1])
    write_tar(out / "shard-000000.tar", samples)
    manifest = load_manifest(out)
    first = dataclasses.replace(manifest.shardlist[0], bytes=(out / "shard-000000.tar").stat().st_size, sha256=None)
    save_manifest(dataclasses.replace(manifest, shardlist=(first, *manifest.shardlist[1:])), out)
    return out


def put(name: str, array: np.ndarray | None = None, data: bytes = b"") -> Callable[[Members], None]:
    return lambda members: members.update({name: data if array is None else write_npy(array)})


LATENT = "chosen.latent.npy"
NAN = np.full((2, 4, 8, 8), np.nan, dtype=np.float16)
BAD: dict[str, tuple[Callable[[Members], None], str]] = {
    "shape": (put(LATENT, np.zeros((2, 4, 8, 9), np.float16)), r"chosen\.latent\.npy: has the shape \(2, 4, 8, 9\)"),
    "nan": (put(LATENT, NAN), r"chosen\.latent\.npy: .*not finite"),
    "negative": (put(LATENT, -np.ones((2, 4, 8, 8), np.float32)), "standard deviation below 0"),
    "pickle": (put(LATENT, data=b"\x80\x04K\x01."), r"is not a plain \.npy file"),
    "missing": (lambda members: members.pop(LATENT), r"has no chosen\.latent\.npy"),
    "missing flip": (lambda members: members.pop("rejected.latent.flip.npy"), r"has no rejected\.latent\.flip\.npy"),
    "prompt": (
        lambda members: members.update({"json": members["json"].replace(b"prompt 1", b"another")}),
        "its prompt 'another' is missing in",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_cached_sample_is_named_or_left_out(name: str, cached: Path, tmp_path: Path):
    change, message = BAD[name]
    folder = with_sample(cached, tmp_path / "bad", change)
    assert [len(problems(str(folder))), *problems(str(folder))][0] == 1
    assert "sample '00001'" in problems(str(folder))[0]
    # A seed with which the sample is mirrored, so that the missing mirrored latents are asked for.
    settings = {"batch_size": 7, "flip": name == "missing flip", "seed": 0}
    while settings["flip"] and not mirrored("00001", settings["seed"]):
        settings["seed"] += 1
    with pytest.raises(UserError, match=f"sample '00001': .*{message}"):
        list(data_of(folder, **settings).train_dataloader())
    skipping = data_of(folder, on_bad_sample="skip", **settings)
    (batch,) = list(skipping.train_dataloader())
    assert "00001" not in batch.keys
    assert len(skipping.bad_samples) == 1


def mirrored(key: str, seed: int) -> bool:
    from lit_safety.core.chance import sample_seed, uniform

    return uniform(sample_seed(seed, 0, key), "flip") < 0.5


def with_cache(cached: Path, out: Path, **changes) -> Path:
    shutil.copytree(cached, out)
    manifest = load_manifest(out)
    save_manifest(dataclasses.replace(manifest, cache=json.loads(json.dumps({**manifest.cache, **changes}))), out)
    return out


def test_a_cache_that_does_not_serve_the_run_is_refused_at_the_start(cached: Path, pairs: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"made at 32 x 32 pixels by .*resolution is 64"):
        data_of(cached, resolution=64).check_sources()
    without = with_cache(cached, tmp_path / "plain", flip=False)
    with pytest.raises(UserError, match="flip"):
        data_of(without, flip=True).check_sources()
    with pytest.raises(UserError, match=r"pairs.* cached"):
        data_of([cached, pairs]).check_sources()
    other = with_cache(cached, tmp_path / "other", model="another", weights={"vae": "f" * 16})
    with pytest.raises(UserError, match=r"was made by .*tiny \(.*, the cache .* by another \(vae ffffffff\)"):
        data_of([cached, other]).check_sources()
    for changes, message in (
        ({"version": 9}, "version 9"),
        ({"dtype": "object"}, "'dtype' must be float16 or float32"),
        ({"latent": [4, 10**6, 10**6]}, "over the limit"),
        ({"weights": {}}, "cache: 'weights'"),
        ({"size": "large"}, "'size' must hold 2 positive"),
    ):
        folder = with_cache(cached, tmp_path / message[:6].strip("'"), **changes)
        with pytest.raises(UserError, match=message):
            data_of(folder).check_sources()
    with pytest.raises(UserError, match=r"use_cache"):
        data_of(cached, use_cache=False).check_sources()
    gone = with_cache(cached, tmp_path / "gone")
    (gone / "prompts.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not a readable cache of prompts"):
        data_of(gone).check_sources()
    assert problems(str(gone))


def test_an_older_cache_is_refused_with_the_command_that_makes_it_again(cached: Path, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        data_of(with_cache(cached, tmp_path / "old", version=1, model="a b")).check_sources()
    assert "--model 'a b'" in str(caught.value)
    for words in ("shards precompute", "--resolution 32", "--flip true", "--dtype float32"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("tokenizer/tokenizer_config.json", {"pad_token": "a</w>"}, "tokenizer"),
        ("vae/config.json", {"scaling_factor": 0.5}, "vae"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.012 * 1.05}, "scheduler"),
    ],
)
def test_a_model_whose_settings_differ_does_not_train_on_a_cache(
    file: str, changes: dict[str, object], named: str, pairs: Path, tiny_pipeline: Path, tmp_path: Path
):
    from lit_safety.modules.checks import check_caches, check_references
    from lit_safety.objectives import DiffusionDPO

    precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "out"), reference_draws=1)
    data = data_of(tmp_path / "out")
    data.setup("fit")
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")

    def check() -> None:
        check_caches(data, str(model), "fit")
        check_references(data, str(model), "fit", DiffusionDPO(), drops=False)

    check()
    stated = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(stated | changes))
    with pytest.raises(UserError, match=rf"{named} \w{{8}}\), but"):
        check()


# ---- several processes, half precision, latents alone


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
def test_two_processes_write_what_one_writes(pairs: Path, tiny_pipeline: Path, tmp_path: Path):
    """With text, mirrored latents and a reference cache; a stopped run of one process is continued by two."""
    settings = {"flip": True, "batch_size": 2, "reference_draws": 1}
    for name, count in (("one", 1), ("two", 2)):
        precompute(str(pairs), str(tiny_pipeline), str(tmp_path / name), processes=count, **settings)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_half_written(
    pairs: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second of two processes is killed after two pairs were written; the next run ends in the same bytes."""
    import multiprocessing

    original = LatentWriter._write
    written = []

    def kills(self, writer, one):
        written.append(one.key)
        if len(written) == 2:
            next(child for child in multiprocessing.active_children() if child.name == "encode 1").kill()
        original(self, writer, one)

    arguments = (str(pairs), str(tiny_pipeline), str(tmp_path / "cut"))
    monkeypatch.setattr(LatentWriter, "_write", kills)
    with pytest.raises(UserError, match=r"the process encode 1 ended with status -9.*run the same command again"):
        precompute(*arguments, batch_size=1, processes=2)
    monkeypatch.undo()
    assert not multiprocessing.active_children()
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert {path.suffix for path in (tmp_path / "cut").iterdir()} <= {".safetensors", ".json", ".tar", ".lock", ""}
    precompute(*arguments, batch_size=1)
    precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "whole"), batch_size=1)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_too_many_or_no_processes_are_refused(pairs: Path, tiny_pipeline: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"--processes 0: must be at least 1"):
        precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "out"), processes=0)


def test_no_number_of_a_pair_is_asked_for_while_the_device_works(pairs: Path, backbone: Backbone):
    """Handing over a batch reads no number back: on a GPU each would wait for everything before it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lit_safety.data.cache.encoding import Encoder, How, PairsOf
    from lit_safety.data.reading.source import open_source

    class Asked(TorchDispatchMode):
        names: list[str]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    encoder = Encoder(open_source(str(pairs), "x"), backbone, How("tiny", (32, 32), None, True, "float16", False))
    backbone.part("vae")
    started = encoder.start(PairsOf(0, (0, 1, 2)))
    asked = Asked()
    asked.names = []
    with asked:
        finish = encoder.run(started)

    def numbers() -> list[str]:
        return [name for name in asked.names if re.search(r"_local_scalar_dense|is_nonzero|aten\.item", name)]

    assert not numbers()
    assert any("conv" in name for name in asked.names)
    with asked, torch.inference_mode():
        assert torch.ones(2).all()
    assert numbers(), "such a question is seen"
    assert [one.key for one in finish()] == ["00000", "00001", "00002"]
    encoder.close()


def test_an_image_encoder_in_bfloat16_is_near_and_said(cached: Path, pairs: Path, tiny_pipeline: Path, tmp_path: Path):
    """The same numbers as a training in bf16-mixed, whose images are encoded under autocast."""
    out = tmp_path / "half"
    precompute(
        str(pairs), str(tiny_pipeline), str(out), flip=True, dtype="float32", batch_size=2,
        image_encoder_dtype="bfloat16",
    )  # fmt: skip
    half, whole = (next(iter(data_of(folder).train_dataloader())).latents for folder in (out, cached))
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)
    assert load_manifest(out).provenance["precompute"]["image_encoder_dtype"] == "bfloat16"
    assert "image_encoder_dtype" not in load_manifest(cached).provenance["precompute"]


def test_latents_alone_are_read_and_the_text_is_left_to_the_training(
    cached: Path, pairs: Path, tiny_pipeline: Path, tmp_path: Path
):
    """The same latents, no file of prompts, no hash of a text encoder: another text encoder may train on it."""
    from lit_safety.data.cache.cache import check_model, parse_cache, remake

    out = tmp_path / "alone"
    precompute(str(pairs), str(tiny_pipeline), str(out), flip=True, dtype="float32", batch_size=2, text=False)
    assert not (out / "prompts.safetensors").exists()
    assert problems(str(out)) == []
    manifest = load_manifest(out).cache
    assert set(manifest["weights"]) == {"vae"}
    assert "--text false" in remake(manifest)
    alone, whole = (next(iter(data_of(folder, flip=True).train_dataloader())) for folder in (out, cached))
    assert alone.conditioning is alone.empty is None
    assert torch.equal(alone.latents, whole.latents)
    assert alone.prompts == whole.prompts
    cache = parse_cache(manifest, "here")
    assert check_model(cache, "m", {"vae": cache.weights["vae"], "text_encoder": "another"}, "here") == []
    with pytest.raises(UserError, match="was made by"):
        check_model(cache, "m", {"vae": "another"}, "here")
    with pytest.raises(UserError, match=r"cached holds text and .*alone holds latents alone|latents alone"):
        data_of([cached, out]).check_sources()
    with pytest.raises(UserError, match="--reference_draws needs the text"):
        precompute(str(pairs), str(tiny_pipeline), str(tmp_path / "no"), text=False, reference_draws=1)
