"""Prompts without images that hold a policy to its reference, so that subjects outside the pairs do not change.

Pairs show what must change, and a little of what must stay. The loss says nothing about all other subjects, so they
change together with those in the pairs. Anchor prompts add a loss term for them: the reference draws each prompt once,
and the policy is held to the reference's prediction on these latents. For Gaussian denoisers this is the KL divergence
of one denoising step, up to the timestep's weight (`anchor_loss`). Any prompts can be used, and no images are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_safety.core.chance import integers, normal, uniform
from lit_safety.core.errors import UserError
from lit_safety.modules.step_parts import Anchors
from lit_safety.modules.strategies import weights_are_sharded
from lit_safety.objectives.objective import prediction_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from lightning.pytorch import Trainer

    from lit_safety.backbones.backbone import Backbone, Conditioning
    from lit_safety.data.reading.batch import PairBatch

#: The purposes of an anchor's random numbers: which prompt, timestep, noise, noise on its text.
WHICH, TIMESTEP, NOISE, TEXT = "anchor", "anchor-timestep", "anchor-noise", "anchor-text"
KEY = "model.init_args.anchors.init_args"
SHIPPED = "anchors/harmless.txt"
"""Harmless prompts for models of real photographs and drawings."""
_AT_ONCE = 16


class Anchored(Protocol):
    """What anchors need from the module; `PreferenceModule` provides it."""

    pretrained: str
    backbone: Backbone

    @property
    def device(self) -> torch.device: ...

    @property
    def drawing(self) -> Drawing: ...

    @property
    def has_reference(self) -> bool: ...

    def reference(self) -> AbstractContextManager[None]: ...

    def encode_text(self, prompts: Sequence[str]) -> Conditioning: ...

    def draw_latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor: ...

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]: ...


class Drawing(Protocol):
    """A module's settings for drawing."""

    steps: int
    guidance: float


class PromptAnchors(Anchors):
    """Holds the policy to the reference on the reference's own drawings of harmless prompts.

    Each pair of a batch selects one anchor by its own seed, so that the anchors do not depend on batch size,
    accumulation, ranks or a resume. The term is weight x mean over the batch of |policy - reference|^2. It costs a pass
    of policy and reference on half as many rows as the pairs have.

    Args:
        prompts: file of harmless prompts: a text file with one prompt a line (`anchors/harmless.txt` is shipped: 226
            prompts for models of real photographs and drawings), or a table as `evaluate` reads it, of which the rows
            of kind clean and lookalike are used. It must not contain a subject that a report will call unnamed. A
            file of an embedded world, with a model that is not of this world, is replaced by the shipped list; a line
            says so.
        weight: weight of the term.
        share: probability that a pair selects an anchor, in (0, 1].
        text_noise: standard deviation of noise on the prompts' hidden states, in units of their standard deviation over
            all anchor prompts; 0: none. With noise the policy is also held between and around the prompts.
        seed: seed of the first drawing; each further drawing has the next number.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self, prompts: str, weight: float = 20.0, share: float = 1.0, text_noise: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 < weight < float("inf") or not 0 < share <= 1 or not 0 <= text_noise < float("inf"):
            raise ValueError(
                f"weight must be above 0, share in (0, 1] and text_noise not negative, got {weight}, {share} and "
                f"{text_noise}"
            )
        self.prompts, self.weight, self.share, self.text_noise, self.seed = prompts, weight, share, text_noise, seed
        self._latents: Tensor | None = None
        self._texts: Conditioning = {}
        self._spread: dict[str, Tensor] = {}

    def read_prompts(self, pretrained: str | None = None) -> list[str]:
        """The harmless prompts of the file, or of the shipped list for a model of another world, without repetition.

        Raises:
            UserError: the file cannot be read or holds no harmless prompt.
        """
        from lit_safety.core.shipped import shipped
        from lit_safety.drawing.pipelines import local_pipeline
        from lit_safety.drawing.prompts import read_prompts
        from lit_safety.drawing.worlds import foreign_world

        file = self.prompts
        if pretrained is not None and (world := foreign_world(local_pipeline(pretrained), shipped(file))):
            rank_zero_info(
                f"anchors: {file} is of the embedded world {world}, and {pretrained} is not: {SHIPPED} is used "
                f"instead; set {KEY}.prompts to prompts like those of your users"
            )
            file = SHIPPED
        rows = read_prompts(shipped(file))
        found = list(dict.fromkeys(row.prompt for row in rows if row.kind in ("clean", "lookalike")))
        if not found:
            raise UserError(f"`{KEY}.prompts` {self.prompts}: holds no harmless prompt (kind clean or lookalike)")
        return found

    def prepare(self, module: Anchored, trainer: Trainer) -> None:
        """Draw the prompts with the reference, or read what an earlier run drew. All ranks must call it.

        Raises:
            UserError: the module holds no reference to draw with, or the file holds no prompt.
        """
        if not module.has_reference:
            raise UserError(
                f"`{KEY}` needs the reference for prompts that are not in the cache: set `model.init_args.policy: "
                "lora`, or train on shards without a reference cache"
            )
        prompts = self.read_prompts(module.pretrained)
        file = self._file(module, prompts)
        latents = _read(file) if trainer.is_global_zero else None
        known = bool(trainer.strategy.broadcast(latents is not None))
        if not known:
            if weights_are_sharded(trainer) or trainer.is_global_zero:
                latents = self._draw(module, prompts)
            if trainer.is_global_zero:
                assert latents is not None
                _write(file, latents)
        self._latents = trainer.strategy.broadcast(latents)
        with torch.no_grad():
            parts = [
                {name: rows.cpu() for name, rows in module.encode_text(prompts[i : i + _AT_ONCE]).items()}
                for i in range(0, len(prompts), _AT_ONCE)
            ]
        self._texts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.text_noise:
            self._spread = {
                name: rows.float().std(0) for name, rows in self._texts.items() if rows.ndim == 3 and len(rows) > 1
            }

    def _file(self, module: Anchored, prompts: list[str]) -> Path:
        """The file that keeps the drawings of these prompts by this model."""
        from lit_safety.backbones.fingerprint import reference_hashes
        from lit_safety.core.hashes import digest, user_cache

        backbone = module.backbone
        said = {
            "version": 2,
            "encoders": backbone.encoder_hashes(module.pretrained),
            "reference": reference_hashes(module.pretrained, backbone.DENOISER),
            "scheduler": {name: str(value) for name, value in backbone.inference_scheduler.config.items()},
            "prompts": prompts,
            "seed": self.seed,
            "steps": module.drawing.steps,
            "guidance": module.drawing.guidance,
        }
        return user_cache() / "anchors" / f"{digest(said)[:32]}.safetensors"

    def _draw(self, module: Anchored, prompts: list[str]) -> Tensor:
        from lit_safety.core.progress import progress

        drawn = []
        with torch.no_grad(), module.reference(), progress("anchor prompts", len(prompts)) as advance:
            for start in range(0, len(prompts), _AT_ONCE):
                some = prompts[start : start + _AT_ONCE]
                seeds = [self.seed + start + i for i in range(len(some))]
                drawn.append(module.draw_latents(some, seeds).half().cpu())
                advance(len(some))
        return torch.cat(drawn)

    def loss(self, module: Anchored, batch: PairBatch) -> Tensor:
        """weight x mean over the batch's pairs of |policy - reference|^2 on the anchors that they select, a scalar."""
        if self._latents is None:
            raise RuntimeError("anchors were not prepared: call `prepare` first, as a fit does when it starts")
        seeds = [seed for seed in batch.seeds if self.share == 1 or uniform(seed, "anchor-share") < self.share]
        if not seeds:  # every rank must take part in the backward pass
            return torch.stack([p.sum() * 0.0 for _, p in module.trainable_parameters()]).sum()
        backbone, device = module.backbone, module.device
        rows = integers(seeds, WHICH, len(self._latents))
        fractions = torch.tensor([uniform(seed, TIMESTEP) for seed in seeds], dtype=torch.float64)
        with torch.no_grad():
            latents = self._latents[rows].float().to(device, non_blocking=True)
            noise = normal(seeds, NOISE, latents.shape[1:]).to(device, non_blocking=True)
            size = latents.shape[-2], latents.shape[-1]
            timesteps = backbone.timesteps(fractions, size).to(device, non_blocking=True)
            noisy = backbone.add_noise(latents, noise, timesteps)
            texts = {name: self._text(name, rows, seeds).to(device, non_blocking=True) for name in self._texts}
            with module.reference():
                wanted = backbone.predict(noisy, timesteps, texts)
        error = prediction_error(backbone.predict(noisy, timesteps, texts), wanted)
        return self.weight * error.sum() / len(batch)

    def _text(self, name: str, rows: Tensor, seeds: list[int]) -> Tensor:
        texts = self._texts[name][rows]
        if name not in self._spread:
            return texts
        noise = normal(seeds, TEXT, texts.shape[1:])
        return (texts.float() + self.text_noise * self._spread[name] * noise).to(texts.dtype)


def _read(file: Path) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        return None
    try:
        return load_file(file)["latents"]
    except (SafetensorError, KeyError, OSError):  # the caller draws again and overwrites the file
        return None


def _write(file: Path, latents: Tensor) -> None:
    from safetensors.torch import save

    from lit_safety.core.files import write_atomic

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"latents": latents.contiguous()}))
