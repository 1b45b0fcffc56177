"""`lit_safety shards precompute`: run the frozen encoders over a folder of shards once, instead of at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lit_safety.core.stages import InOrder
    from lit_safety.data.cache.encoding import Encoder, ReferenceWriter
    from lit_safety.data.cache.writing import Settings
    from lit_safety.data.reading.source import Source


def precompute(
    folder: str,
    model: str | None = None,
    out: str | None = None,
    resolution: int | None = None,
    flip: bool = False,
    batch_size: int = 8,
    dtype: Literal["float16", "float32"] = "float16",
    keep_images: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    reference_draws: int = 0,
    reference_dropout: bool = False,
    reference_predictions: bool = False,
    reference_precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    denoiser_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    image_encoder_dtype: Literal["float32", "bfloat16"] = "float32",
    text: bool = True,
    processes: int = 1,
) -> None:
    """Write cached shards: latents and text-encoder outputs, so that training needs no VAE and no text encoder.

    Each image becomes the mean and standard deviation of its latents, so every step still draws its own sample of them.
    The encodings of the prompts are in prompts.safetensors, each once. The manifest names the model, a hash of
    its encoders and the resolution: training refuses a cache of another model. A stopped run continues when it is
    started again.

    Args:
        folder: The shards: a folder, a tar file or a pattern of tar files.
        model: The model that will be trained on them: a diffusers pipeline folder or a hub id. Needed.
        out: The folder to write the cached shards to. Needed.
        resolution: Side in pixels: the shorter side is scaled to it, and the middle is cut out as a square; null: as
            stored, and all images must have one size.
        flip: Also store the latents of mirrored images, for training with `flip`.
        batch_size: Pairs that are encoded at once.
        dtype: How latents and text are stored: float16 needs half the space, float32 trains exactly as without a cache.
        keep_images: Keep the images next to the latents.
        device: The device, such as cuda or cpu; null: a GPU if there is one.
        overwrite: Delete what an earlier run left in the folder.
        reference_draws: Also store a reference cache: so many fixed draws of timestep and noise for each pair, with the
            errors of the untrained denoiser. Training then does not run the reference, and each pass uses the next
            draw.
        0: none.
        reference_dropout: Also store these errors without the prompt, for training with prompt_dropout; twice the time.
        reference_predictions: Also store the predictions on the chosen images of clean prompts, which anchor_weight
            needs. Each needs a quarter of the space of a pair's latents.
        reference_precision: The precision of the reference: give the trainer.precision of the training.
        encoder_dtype: Number format of the text encoders; large ones do not fit a GPU in float32.
        denoiser_dtype: Number format of the denoiser's weights, for a reference cache: give that of the training.
        image_encoder_dtype: Number format in which the image encoder computes. bfloat16: as a training with
            trainer.precision bf16-mixed encodes images; faster on a GPU, and its rounding is in every latent.
        text: Also store the text encoders' outputs. false: latents alone, a small part of the space for models with
            large text encoders; training then encodes its prompts itself.
        processes: Processes that encode, each with the model; with the device cuda, process i takes GPU i.
    """
    from pathlib import Path

    from lit_safety.core.processes import check_count
    from lit_safety.core.progress import quiet_libraries
    from lit_safety.core.stages import staged
    from lit_safety.data.cache.reference import MAX_DRAWS, ReferenceCache
    from lit_safety.data.cache.writing import LatentWriter, Settings, image_size
    from lit_safety.data.format.manifest import FILE_NAME, load_manifest
    from lit_safety.data.reading.source import open_source
    from lit_safety.users.table import copy_users

    if model is None or out is None:
        raise UserError("give --model (the pipeline that will be trained) and --out (the folder of the cached shards)")
    if batch_size < 1 or (resolution is not None and resolution < 1):
        raise UserError("--batch_size and --resolution must be at least 1")
    if not 0 <= reference_draws <= MAX_DRAWS:
        raise UserError(f"--reference_draws must lie between 0 and {MAX_DRAWS}")
    if (reference_dropout or reference_predictions) and not reference_draws:
        raise UserError("--reference_dropout and --reference_predictions belong to --reference_draws: give how many")
    if reference_draws and not text:
        raise UserError("--reference_draws needs the text encoders' outputs; leave --text false out")
    check_count(processes, "--processes")
    source, target = open_source(folder, "folder"), Path(out)
    if any(one.cache for one in source.caches):
        raise UserError(f"{folder}: is already cached; give the shards it was made from")
    if target.exists() and any(Path(path).resolve().parent == target.resolve() for path in source.paths):
        raise UserError(f"{out}: is the folder of the input shards; name another one")
    quiet_libraries()
    load = _Load(model, device, reference_draws > 0, encoder_dtype, denoiser_dtype, image_encoder_dtype)
    backbone = load.backbone(0, processes) if processes == 1 else load.on_cpu()
    settings = Settings(
        model=model,
        weights=_cache_hashes(backbone, text),
        size=image_size(source, resolution),
        resolution=resolution,
        flip=flip,
        dtype=dtype,
        images=keep_images,
        reference=ReferenceCache(
            reference_draws, _denoiser_hash(backbone), reference_precision, reference_dropout, reference_predictions
        )
        if reference_draws
        else None,
        encoder_dtype=encoder_dtype,
        denoiser_dtype=denoiser_dtype if reference_draws else "float32",
        image_encoder_dtype=image_encoder_dtype,
        text=text,
    )
    if (target / FILE_NAME).exists() and not overwrite:
        if load_manifest(target).provenance.get("precompute") != settings.to_dict(source):
            raise UserError(f"{target}: already holds other shards; name another folder or give --overwrite true")
        print(f"{target}: is already complete")
        return
    copy_users(folder, target)
    prompts = _prompts(source) if text else []
    truncated = [prompt for prompt, cut in zip(prompts, backbone.too_long(prompts), strict=True) if cut]
    make = _MakeEncoder(load, source, settings, target, backbone if processes == 1 else None)
    del backbone  # several processes load their own
    with staged(make, processes, "encode") as encode:
        if text:
            _write_text(prompts, target, settings, batch_size, encode)
        manifest = LatentWriter(source, target, settings, truncated, overwrite).write(batch_size, encode)
    size = sum(shard.bytes or 0 for shard in manifest.shardlist)
    print(f"{target}: {manifest.nsamples} pairs in {len(manifest.shardlist)} shards, {size / 1e6:.1f} MB")
    if truncated:
        print(f"  {len(truncated)} prompts are too long for the text encoder and were cut; first: {truncated[0]!r}")


@dataclass(frozen=True)
class _Load:
    """How the model is loaded; it is sent to other processes."""

    model: str
    device: str | None
    denoiser: bool
    encoder_dtype: Any
    denoiser_dtype: Any
    image_encoder_dtype: Any

    def backbone(self, rank: int, processes: int) -> Any:
        """The model on the device of one of several processes.

        Raises:
            UserError: it does not load, or the device is missing, too small, or cannot compute in this precision.
        """
        import torch

        from lit_safety.core.hardware import check_precision, device_of_rank

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            chosen = torch.device(device_of_rank(device, rank, processes))
            check_precision(self.image_encoder_dtype, str(chosen), "--image_encoder_dtype")
            return self.on_cpu().to(chosen)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise UserError(f"--device {self.device}: {str(error).splitlines()[0]}") from error

    def on_cpu(self) -> Any:
        """The model where it was loaded."""
        import torch

        from lit_safety.backbones.load import load_backbone
        from lit_safety.backbones.lowered import lower_frozen
        from lit_safety.backbones.settings import BackboneSettings

        backbone = load_backbone(
            self.model, self.denoiser, "--model", BackboneSettings(self.encoder_dtype, self.denoiser_dtype)
        )
        if self.denoiser and self.denoiser_dtype != "float32":
            lower_frozen(backbone.denoiser, getattr(torch, self.denoiser_dtype))  # as a training does
        return backbone


@dataclass(frozen=True)
class _MakeEncoder:
    """Makes the encoder of one of several processes; it is sent to them."""

    load: _Load
    source: Source
    settings: Settings
    target: Any
    loaded: Any
    """The model, if this process does the work; None: each process loads it."""

    def __call__(self, rank: int, processes: int) -> Encoder:
        from lit_safety.core.progress import quiet_libraries
        from lit_safety.data.cache.encoding import Encoder

        quiet_libraries()
        backbone = self.loaded or self.load.backbone(rank, processes)
        return Encoder(self.source, backbone, self.settings.how, self._reference(backbone))

    def _reference(self, backbone: Any) -> Callable[[], ReferenceWriter] | None:
        """Runs the denoiser as a training step runs its reference."""
        if (stored := self.settings.reference) is None:
            return None

        def make() -> ReferenceWriter:
            from lit_safety.data.cache.cache import PROMPTS
            from lit_safety.data.cache.encoding import ReferenceWriter
            from lit_safety.data.cache.prompt_table import PromptTables
            from lit_safety.modules.frozen_reference import FrozenReference

            run = FrozenReference(self.settings.model, backbone, stored.precision)
            return ReferenceWriter(run, stored, PromptTables({str(self.target / PROMPTS): None}), self.settings.dtype)

        return make


def _cache_hashes(backbone: Any, text: bool) -> dict[str, str]:
    """Hashes of the encoders that are used. For a hub id their files are fetched first."""
    from lit_safety.data.cache.cache import is_of_text

    for name in backbone.encoders():
        if text or not is_of_text(name):
            backbone.part(name)
    hashes: dict[str, str] = backbone.encoder_hashes(backbone.parts.source)
    found = {name: one for name, one in hashes.items() if text or not is_of_text(name)}
    wanted = [name for name in backbone.ENCODERS if text or not is_of_text(name)]
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{backbone.parts.source}: the weights of its {missing[0]} are missing, and a cache must name them; "
            "give a folder with safetensors"
        )
    return found


def _denoiser_hash(backbone: Any) -> dict[str, str]:
    from lit_safety.backbones.fingerprint import reference_hashes

    found = reference_hashes(backbone.parts.source, backbone.DENOISER)
    if backbone.DENOISER not in found:
        raise UserError(
            f"{backbone.parts.source}: the weights of its {backbone.DENOISER} are missing, so a reference cache could "
            "not name its model; give a folder with safetensors"
        )
    return found


def _prompts(source: Source) -> list[str]:
    from lit_safety.data.cache.prompt_table import prompts_of

    return prompts_of(source)


def _write_text(prompts: list[str], target: Any, settings: Settings, batch_size: int, encode: InOrder) -> None:
    """Write `prompts.safetensors`."""
    from lit_safety.core.progress import counter
    from lit_safety.data.cache.cache import made_by
    from lit_safety.data.cache.encoding import Texts
    from lit_safety.data.cache.prompt_table import write_prompt_table

    maker = {"model": settings.model, "weights": made_by(settings.weights)}
    if settings.encoder_dtype != "float32":
        maker["encoder_dtype"] = settings.encoder_dtype
    with counter("text", len(prompts) + ("" not in prompts)) as tick:
        write_prompt_table(
            target,
            prompts,
            lambda batches: encode(Texts(tuple(batch)) for batch in batches),
            maker,
            settings.dtype,
            2 * batch_size,
            tick,
        )
