"""`lit_safety shards repair`: the harm of an image is repainted and nothing else, which makes a minimal pair.

An image that a harmful prompt gave and its repaired self differ where the harm was. What a preference loss learns from
such a pair is about the harm, and with `data.init_args.masked` it looks nowhere else. Where the harm is, a mask says:

- `attention`: the cross-attention of the denoiser to the words of the prompt that no harmless prompt has;
- `cost`: where covering a part of the image lowers its cost most, by the cost model that also scores the result;
- `given`: the masks that the shards hold already.

The masked part is drawn anew for the prompt without the harm, step by step, while the rest is put back at each step
from the image itself with noise (blended latent diffusion, arXiv 2206.02779), or by the family's stock inpainting
pipeline; and at the end in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.drawing.pipelines import PainterSettings

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lit_safety.backbones.backbone import Backbone
    from lit_safety.cost_model.network import CostScorer
    from lit_safety.data.format.sample import PairMetadata
    from lit_safety.data.reading.source import Source
    from lit_safety.generation.words import Words

Mask = Literal["attention", "cost", "given"]
Painting = Literal["blended", "stock"]
#: Shares of the noise at which attention is looked at.
LOOKED_AT = (0.3, 0.5, 0.7)
#: Parts that an image's side is divided into, and how many of them are covered at once.
PARTS, COVERED = 8, 2

NO_HARM = "whose rejected image costs nothing, so that there is no harm to repaint"
NO_WORD = "whose prompt has no word that harmless prompts do not have"
NO_MASK = "without a mask"
ALL_OVER = "whose mask is most of the image"
STAYED = "whose repaired image is still harmful"
REPAIRED = "repaired"


def repair(
    folder: str,
    *,
    pipeline: str,
    cost_model: str,
    prompts: str,
    out: str,
    mask: Mask = "attention",
    painting: Painting = "blended",
    threshold: float = 0.5,
    grow: int = 1,
    largest: float = 0.6,
    tries: int = 2,
    seed: int = 0,
    reports: list[str] | None = None,
    samples_per_shard: int = 256,
    overwrite: bool = False,
    other_world: bool = False,
    **drawing: Any,
) -> None:
    """Make minimal pairs: repaint the harm in the rejected images of shards, and keep those that are safe afterwards.

    The repaired image is chosen, the image as it was is rejected, and `K.mask.png` is white where they differ
    (`data.init_args.masked: true` trains there alone). A pair is left out and counted if its image has no cost above 0,
    no mask is found, or its repaired image still has. A stopped run continues when it is started again.

    Args:
        folder: A folder of shards with images, a tar file or a pattern of tar files. Of groups, the worst image is
            taken.
        pipeline: Folder or hub id of the diffusers pipeline that repaints.
        cost_model: Folder of the cost model that says whether an image is harmful.
        prompts: File of harmless prompts, as `evaluate` reads it: a prompt's words that none of them has name the harm.
        out: The folder to write the shards to.
        mask: Where the harm is: `attention` of the denoiser (one with a UNet) to the words of the harm; `cost`: where
            covering the image lowers its cost; `given`: the shards' own masks.
        painting: How it is drawn anew: `blended`: by the text-to-image pipeline, with the rest put back at each step;
            `stock`: by the inpainting pipeline that diffusers has for the family (Stable Diffusion 1.5 to 3, FLUX.1,
            FLUX.2 klein, Qwen-Image, Z-Image), from noise alone.
        threshold: A place belongs to the mask from this share of the strongest one on, in (0, 1].
        grow: By how many latents the mask is made larger on every side.
        largest: A mask of a larger share of the image is refused.
        tries: How often an image is repainted, from other noise, until it is safe.
        seed: With a pair's key, gives the noise.
        reports: Judges that reports measure with: none may be the cost model.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Delete what an earlier run left in the folder.
        other_world: Use a cost model of an embedded world, such as data/toyworld, for a model that is not of this
            world.
        **drawing: How images are drawn, see `PainterSettings`.

    Raises:
        UserError: a setting, the shards or the model cannot be used, or no pair is left.
    """
    from pathlib import Path

    from lit_safety.backbones.load import load_backbone
    from lit_safety.core.hashes import content_sha256, file_sha256
    from lit_safety.core.progress import counter
    from lit_safety.cost_model.files import check_border, load_cost_model
    from lit_safety.data.convert.join import this_device
    from lit_safety.data.format.manifest import FILE_NAME, load_manifest
    from lit_safety.data.format.writer import ShardWriter
    from lit_safety.data.reading.source import open_source
    from lit_safety.drawing.pipelines import local_pipeline
    from lit_safety.drawing.prompts import read_prompts
    from lit_safety.drawing.worlds import check_world
    from lit_safety.generation.rewards import refuse_rewards
    from lit_safety.generation.words import Words

    settings = PainterSettings(**drawing)
    _check(threshold, grow, largest, tries)
    if settings.resolution is not None:
        raise UserError(f"--resolution {settings.resolution}: images are repainted in their own size; leave it out")
    if settings.precision != "float32":
        raise UserError(f"--precision {settings.precision}: images are repainted in float32; leave it out")
    source, target = open_source(folder, "folder"), Path(out)
    if source.manifest.cache is not None:
        raise UserError(f"{folder}: holds cached latents; repair the shards that it was made from")
    base = local_pipeline(pipeline)
    check_world(base, {"--cost_model": cost_model}, other_world)
    refuse_rewards({cost_model: "--cost_model"}, reports or [])
    check_border(cost_model, "--cost_model")
    harmless = [row.prompt for row in read_prompts(prompts) if not row.harmful]
    if not harmless:
        raise UserError(f"--prompts {prompts}: holds 0 harmless prompts (column kind)")
    how = Repaint(settings, mask, painting, threshold, grow, largest, tries, seed)
    provenance = {
        "command": "repair",
        "from": [list(one) for one in source.identity()],
        "pipeline": pipeline,
        "pipeline_sha256": content_sha256(base),
        "cost_model_sha256": content_sha256(cost_model),
        "prompts_sha256": file_sha256(prompts),
        **{name: value for name, value in vars(how).items() if name != "drawing"},
        "steps": settings.steps,
        "guidance": settings.guidance,
        "batch_size": settings.batch_size,
    }
    if (target / FILE_NAME).exists() and not overwrite:
        if load_manifest(target).provenance != provenance:
            raise UserError(f"{target}: already holds other shards; name another folder or give --overwrite true")
        print(f"{target}: is already complete")
        return
    device = this_device(settings.device)
    backbone = load_backbone(str(base)).to(device)
    painter = Repainter(backbone, load_cost_model(cost_model, device), Words(harmless), how)
    counts: Counter[str] = Counter()
    with ShardWriter(
        target, samples_per_shard, provenance=provenance, seeds={"seed": seed}, overwrite=overwrite, resume=True
    ) as writer:
        with counter("repair", source.manifest.nsamples) as count:
            for batch in _batches(source, settings.batch_size):
                for found in painter([one for one in batch if one.key not in writer]):
                    counts[found.outcome] += 1
                    if found.outcome == REPAIRED:
                        writer.write(found.key, found.metadata, found.repaired, found.image, mask=found.mask)
                for _ in batch:
                    count()
        for reason, times in sorted(counts.items()):
            if reason != REPAIRED:
                print(f"{target}: left out {times} {reason}")
    print(f"{target}: {len(writer)} pairs")


def _check(threshold: float, grow: int, largest: float, tries: int) -> None:
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold}: must lie above 0 and not above 1")
    if not 0 < largest <= 1:
        raise UserError(f"--largest {largest}: must lie above 0 and not above 1")
    if grow < 0 or tries < 1:
        raise UserError(f"--grow {grow} and --tries {tries}: must be at least 0 and 1")


@dataclass(frozen=True)
class Repaint:
    """How masks are found and images repainted; see `repair`."""

    drawing: PainterSettings
    kind: Mask
    painting: Painting
    threshold: float
    grow: int
    largest: float
    tries: int
    seed: int


@dataclass
class Item:
    """An image on its way: what it is, and what became of it."""

    key: str
    metadata: PairMetadata
    image: Image
    given: Image | None
    outcome: str = ""
    repaired: Image | None = None
    mask: Image | None = None


def _batches(source: Source, size: int) -> Iterator[list[Item]]:
    from lit_safety.core.images import decode_image, rgb
    from lit_safety.data.reading.decode import MASK
    from lit_safety.data.reading.stored import stored_pairs

    batch: list[Item] = []
    for one in stored_pairs(source):
        worst = one.metadata.sides[1]
        image = rgb(decode_image(one.images[worst], f"{one.where}: {one.metadata.names[worst]}"))
        given = decode_image(one.mask[MASK], f"{one.where}: {MASK}").convert("L") if one.mask else None
        if batch and batch[0].image.size != image.size:  # images of one batch have one size
            yield batch
            batch = []
        batch.append(Item(one.key, one.metadata, image, given))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Repainter:
    """Repaints the harm of a batch of images.

    Args:
        backbone: draws.
        scorer: says what is harmful.
        words: of harmless prompts.
        how: the settings.
    """

    def __init__(self, backbone: Backbone, scorer: CostScorer, words: Words, how: Repaint) -> None:
        self.backbone = backbone
        self.scorer = scorer
        self.words = words
        self.how = how
        self.pipe: Any = backbone.pipeline()
        if how.kind == "attention" and getattr(self.pipe, "unet", None) is None:
            raise UserError(
                f"--mask attention looks at a UNet's cross-attention, and {type(self.pipe).__name__} has none: give "
                "--mask cost, or given"
            )
        self.inpainter: Any = None
        if how.painting == "stock":
            from lit_safety.drawing.pipelines import inpainting

            self.inpainter = inpainting(self.pipe, "leave --painting out")

    def __call__(self, items: Sequence[Item]) -> list[Item]:
        """The same items, each with what became of it."""
        import torch

        if not items:
            return []
        with torch.no_grad():
            before = self._costs([one.image for one in items])
            left = []
            for one, cost in zip(items, before, strict=True):
                one.outcome = NO_HARM if cost <= 0 else ""
                if cost > 0 and one.metadata.prompt_kind == "harmful" and not self.words.unknown(one.metadata.prompt):
                    one.outcome = NO_WORD
                if not one.outcome:
                    left.append((one, cost))
            self._mask([one for one, _ in left])
            left = [(one, cost) for one, cost in left if not one.outcome]
            for attempt in range(self.how.tries):
                again = [(one, cost) for one, cost in left if one.outcome != REPAIRED]
                if again:
                    self._repaint(again, attempt)
        return list(items)

    def _costs(self, images: Sequence[Image]) -> list[float]:
        costs = self.scorer.costs(list(images))
        if not bool(costs.isfinite().all()):
            raise UserError("the cost model gives a cost that is not finite: check the model")
        return [float(cost) for cost in costs.tolist()]

    def _latents(self, items: Sequence[Item]) -> Tensor:
        import torch

        from lit_safety.data.reading.decode import to_tensor

        images = torch.stack([to_tensor(one.image) for one in items]).to(self.backbone.device)
        posterior = self.backbone.posterior(images)
        return self.backbone.latents(posterior, torch.zeros_like(posterior[:, 0]))

    # ---- where the harm is

    def _mask(self, items: Sequence[Item]) -> None:
        """Give each item its mask (of the image's size, in whole latents), or the reason why there is none."""
        import numpy as np
        import torch
        import torch.nn.functional as F
        from PIL import Image

        if not items:
            return
        latents = self._latents(items)
        size = latents.shape[-2], latents.shape[-1]
        if self.how.kind == "given":
            heat = torch.zeros(len(items), *size)
            for row, one in enumerate(items):
                if one.given is not None:
                    white = torch.from_numpy(np.asarray(one.given, dtype=np.float32) >= 128).float()
                    heat[row] = F.adaptive_max_pool2d(white[None, None], size)[0, 0]
        elif self.how.kind == "cost":
            heat = torch.stack([covered_heat(self.scorer, one.image, size) for one in items])
        else:
            heat = self._attention(items, latents)
        for one, values in zip(items, heat, strict=True):
            found = above(values, self.how.threshold, self.how.grow)
            if not found.any():
                one.outcome = NO_MASK
            elif float(found.float().mean()) > self.how.largest:
                one.outcome = ALL_OVER
            else:
                small = Image.fromarray((found.numpy() * 255).astype(np.uint8))
                one.mask = small.resize(one.image.size, Image.Resampling.NEAREST)

    def _attention(self, items: Sequence[Item], latents: Tensor) -> Tensor:
        """Attention (B, h, w) to the words of the harm, summed over the finest layers and amounts of noise."""
        import torch

        from lit_safety.core.chance import normal, sample_seed

        size = latents.shape[-2], latents.shape[-1]
        prompts = [one.metadata.prompt for one in items]
        tokens = [self._tokens(prompt) for prompt in prompts]
        seeds = [sample_seed(self.how.seed, 0, one.key) for one in items]
        conditioning = self.backbone.encode_text(prompts)
        found = torch.zeros(len(items), *size)
        for share in LOOKED_AT:
            noise = normal(seeds, f"attention {share}", latents.shape[1:]).to(latents)
            fractions = torch.full((len(items),), share, dtype=torch.float64)
            timesteps = self.backbone.timesteps(fractions, size).to(latents.device)
            noisy = self.backbone.add_noise(latents, noise, timesteps)
            with recorded(self.backbone.denoiser) as maps:
                self.backbone.predict(noisy, timesteps, conditioning)
            # Coarse layers say which half of an image it is; the finest ones where.
            finest = max(layer.shape[1] for layer in maps)
            for layer in maps:
                if layer.shape[1] == finest:
                    found += to_words(layer, tokens, size)
        return (found - found.amin((1, 2), keepdim=True)).square()  # attention falls off slowly around a thing

    def _tokens(self, prompt: str) -> list[int]:
        """Places of the tokens of the words that no harmless prompt has."""
        name, limit = self.backbone.TOKENIZERS[0]
        tokenizer = self.backbone.parts.get(name)
        given = prompt.split()
        return word_tokens(tokenizer, given, self.words.unknown(prompt), limit or tokenizer.model_max_length)

    # ---- painting

    def _repaint(self, items: Sequence[tuple[Item, float]], attempt: int) -> None:
        import numpy as np
        import torch
        from PIL import Image

        from lit_safety.core.chance import derive, sample_seed
        from lit_safety.data.format.sample import Sides

        seeds = [derive(sample_seed(self.how.seed, attempt, one.key), "repaint") for one, _ in items]
        texts = [
            self.words.dropped(one.metadata.prompt, seed)
            if one.metadata.prompt_kind == "harmful"
            else one.metadata.prompt
            for (one, _), seed in zip(items, seeds, strict=True)
        ]
        given = [one.image for one, _ in items]
        white = [one.mask for one, _ in items if one.mask is not None]
        if self.inpainter is not None:
            painted = stock_painted(self.inpainter, given, white, texts, seeds, self.how.drawing)
        else:
            latents = self._latents([one for one, _ in items])
            size = latents.shape[-2], latents.shape[-1]
            small = [one.resize(size[::-1], Image.Resampling.NEAREST) for one in white]
            masks = torch.stack([torch.from_numpy(np.asarray(one) > 127) for one in small])
            side = given[0].height, given[0].width
            painted = blended(self.backbone, self.pipe, latents, masks, texts, seeds, self.how.drawing, side)
        images = [put_back(pixels, one) for pixels, (one, _) in zip(painted, items, strict=True)]
        for image, cost, (one, before) in zip(images, self._costs(images), items, strict=True):
            one.outcome = STAYED
            if cost <= 0:  # and the image as it was is above 0
                one.outcome, one.repaired = REPAIRED, image
                one.metadata = replace(
                    one.metadata,
                    harmful=Sides(None, one.metadata.harmful.rejected),
                    cost=Sides(round(cost, 5), round(before, 5)),
                    score=None,
                    order="safety",
                    images=(),
                    seed=None,
                    noise_seeds=None,
                )


def covered_heat(scorer: CostScorer, image: Image, size: tuple[int, int]) -> Tensor:
    """By how much the cost falls where a part of an image is covered by its surroundings' mean, (h, w), at least 0."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    starts = range(PARTS - COVERED + 1)
    rows, columns = (
        [slice(start * side // PARTS, (start + COVERED) * side // PARTS) for start in starts]
        for side in (height, width)
    )
    places = [(row, column) for row in rows for column in columns]
    covered = []
    for place in places:
        copy = pixels.copy()
        copy[place] = pixels.reshape(-1, 3).mean(0)
        covered.append(Image.fromarray(copy))
    costs = scorer.costs([image, *covered]).float().cpu()
    falls = (costs[0] - costs[1:]).clamp(min=0)
    heat, times = torch.zeros(height, width), torch.zeros(height, width)
    for place, fall in zip(places, falls.tolist(), strict=True):
        heat[place] += fall
        times[place] += 1
    return F.adaptive_avg_pool2d((heat / times.clamp(min=1))[None, None], size)[0, 0]


def above(heat: Tensor, threshold: float, grow: int) -> Tensor:
    """Where heat (h, w) is at least this share of its largest value, made larger by ``grow``; if it is 0, nowhere."""
    import torch.nn.functional as F

    if float(heat.max()) <= 0:
        return heat > 0
    found = heat >= threshold * heat.max()
    return F.max_pool2d(found.float()[None, None], 2 * grow + 1, stride=1, padding=grow)[0, 0] > 0


@contextmanager
def recorded(denoiser: Any) -> Iterator[list[Tensor]]:
    """Inside, a UNet's cross-attention is noted: the list is filled with a map (B, places, tokens) for each layer, the
    mean over heads."""
    found: list[Tensor] = []
    before = dict(denoiser.attn_processors)
    own = {name: _Noting(one, found) if name.endswith("attn2.processor") else one for name, one in before.items()}
    denoiser.set_attn_processor(own)
    try:
        yield found
    finally:
        denoiser.set_attn_processor(before)


class _Noting:
    """An attention processor that notes the weights and then does what the one in its place does."""

    def __init__(self, inner: Any, found: list[Tensor]) -> None:
        self.inner = inner
        self.found = found

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, *more: Any, **named: Any,
    ) -> Any:  # fmt: skip
        if encoder_hidden_states is not None and hidden_states.ndim == 3:
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))
            key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            weights = attn.get_attention_scores(query, key)  # (B heads, places, tokens)
            self.found.append(weights.unflatten(0, (len(hidden_states), -1)).mean(1).float())
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *more, **named)


def to_words(layer: Tensor, tokens: Sequence[Sequence[int]], size: tuple[int, int]) -> Tensor:
    """A layer's map (B, places, tokens) -> (B, h, w): the attention to each image's tokens, its largest value 1."""
    import torch
    import torch.nn.functional as F

    count = layer.shape[1]
    height = max(1, round((count * size[0] / size[1]) ** 0.5))
    if count % height:
        raise UserError(f"a layer attends from {count} places, which are no image of {size[0]} x {size[1]} latents")
    rows = torch.stack([layer[row][:, list(places)].sum(1) for row, places in enumerate(tokens)]).cpu()
    maps = F.interpolate(rows.view(len(rows), 1, height, -1), size, mode="bilinear", align_corners=False)[:, 0]
    low = maps.amin((1, 2), keepdim=True)
    return (maps - low) / (maps.amax((1, 2), keepdim=True) - low).clamp(min=1e-12)


def word_tokens(tokenizer: Any, words: Sequence[str], wanted: Sequence[int], limit: int) -> list[int]:
    """Places of the tokens of some words of a prompt, as the tokenizer counts them with its own first token.

    Words are split on their own, which for tokenizers that end words at blanks gives the same tokens.
    """
    alone = len(tokenizer("", add_special_tokens=True)["input_ids"])
    place = 1 if alone > 1 else 0  # a first and a last token, or a last one alone
    found: list[int] = []
    for number, word in enumerate(words):
        count = len(tokenizer(word, add_special_tokens=False)["input_ids"])
        if number in set(wanted):
            found += [one for one in range(place, place + count) if one < limit - 1]
        place += count
    return found


def blended(
    backbone: Backbone,
    pipe: Any,
    latents: Tensor,
    masks: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: PainterSettings,
    side: tuple[int, int],
) -> list[Any]:
    """Draw the masked part of images for prompts, and keep the rest.

    Args:
        backbone: of the pipeline.
        pipe: its stock pipeline, which tells of each step (`callback_on_step_end`).
        latents: of the images, scaled, (B, C, h, w).
        masks: (B, h, w), true where it is drawn.
        prompts: what for.
        seeds: of the noise.
        settings: how.
        side: height and width of the images in pixels.

    Returns:
        Pixels (H, W, 3) in [0, 1] of each image.
    """
    import inspect

    import torch

    from lit_safety.backbones.call import call_options

    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        raise UserError(f"{type(pipe).__name__} does not tell of its steps, so that a part of an image cannot be kept")
    drawn = masks.to(latents.device)[:, None]
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(latents)

    def keep(own: Any, step: int, _: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
        here = backbone.drawn_latents(named["latents"])
        times = own.scheduler.timesteps
        around = latents
        if step + 1 < len(times):
            time = times[step + 1].reshape(1).repeat(len(latents))
            noising = getattr(own.scheduler, "add_noise", None)
            if noising is not None:
                around = noising(latents, noise, time)
            else:  # rectified flow
                around = own.scheduler.scale_noise(latents, time, noise)
        mixed = torch.where(drawn, here, around.to(here))
        return {"latents": backbone.given_latents(mixed).to(named["latents"])}

    try:
        return list(
            pipe(
                prompt=list(prompts),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=settings.steps,
                height=side[0],
                width=side[1],
                output_type="np",
                callback_on_step_end=keep,
                callback_on_step_end_tensor_inputs=["latents"],
                **call_options(pipe, settings.guidance, count=len(prompts)),
            ).images
        )
    except ValueError as error:
        raise UserError(f"{type(pipe).__name__} refuses the settings: {str(error).splitlines()[0]}") from error


def stock_painted(
    pipe: Any,
    images: Sequence[Image],
    masks: Sequence[Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: PainterSettings,
) -> list[Any]:
    """Draw the masked part of images for prompts by a stock inpainting pipeline, which begins it from noise alone.

    Args:
        pipe: as `inpainting` makes it.
        images: of one size.
        masks: of the same size, white where it is drawn.
        prompts: what for.
        seeds: of all noise of each image.
        settings: how.

    Returns:
        Pixels (H, W, 3) in [0, 1] of each image.
    """
    import torch

    from lit_safety.backbones.call import call_options

    try:
        return list(
            pipe(
                prompt=list(prompts),
                image=list(images),
                mask_image=list(masks),
                strength=1.0,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=settings.steps,
                height=images[0].height,
                width=images[0].width,
                output_type="np",
                **call_options(pipe, settings.guidance, count=len(prompts)),
            ).images
        )
    except ValueError as error:
        raise UserError(f"{type(pipe).__name__} refuses the settings: {str(error).splitlines()[0]}") from error


def put_back(pixels: Any, item: Item) -> Image:
    """Painted pixels (H, W, 3) in [0, 1] inside an item's mask, the item's own outside, to the byte.

    Raises:
        UserError: a number is not finite: it would become black, and look safe.
    """
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        raise UserError(f"sample {item.key}: the pipeline drew numbers that are not finite")
    assert item.mask is not None
    painted = Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
    return Image.composite(painted, item.image, item.mask)
