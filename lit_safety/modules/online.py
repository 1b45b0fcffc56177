"""Alignment from prompts and a cost model alone: the policy draws, is scored, and learns from it, in rounds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_safety.core.chance import NOISE, TIMESTEP, derive, uniform
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import Rounds, datamodule_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.data.rounds import places_of
from lit_safety.generation.pairs import Scorer
from lit_safety.generation.rewards import refuse_rewards
from lit_safety.generation.words import Words
from lit_safety.modules.preference import PreferenceModule
from lit_safety.modules.round_page import SHOWN, Seen, keep_image, write_page, write_round
from lit_safety.modules.rounds import (
    OWN,
    Explore,
    Round,
    Slot,
    column,
    explored_slots,
    first_images,
    first_slots,
    more_slots,
    round_file,
    round_prompts,
    sorted_prompts,
    weights_digest,
)
from lit_safety.modules.stability import PlainSteps
from lit_safety.modules.strategies import weights_are_sharded
from lit_safety.objectives.constrained import rectified_excess
from lit_safety.objectives.nft import DiffusionNFT, nft_errors
from lit_safety.objectives.objective import PairErrors, PairLabels, prediction_error

if TYPE_CHECKING:
    import numpy as np

    from lit_safety.backbones.backbone import Conditioning
    from lit_safety.cost_model.ensemble import CostEnsemble
    from lit_safety.cost_model.network import CostScorer
    from lit_safety.drawing.prompts import Prompt

__all__ = ["OnlineSCDPO", "Rollout"]

_AT_ONCE = 16
_KEPT = 2
"""Rounds whose latents stay on the disk."""


@dataclass
class Rollout:
    """How the images are drawn that are learned from.

    Args:
        steps: denoising steps.
        guidance: scale of classifier-free guidance. 1: the policy is the network's own prediction, which is also
            what is trained. Above 1 the guided prediction is the policy, in drawing and in training, at three times
            the work. Of families with embedded guidance the scale that they are told, as in
            `backbone.init_args.guidance`.
        batch_size: images drawn at once; pixels depend on it by rounding.

    Raises:
        ValueError: a number is outside its range.
    """

    steps: int = 20
    guidance: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not 1 <= self.guidance < float("inf"):
            raise ValueError(
                f"rollout: steps and batch_size must be at least 1 and guidance at least 1, got {self.steps}, "
                f"{self.batch_size} and {self.guidance}"
            )


class OnlineSCDPO(PreferenceModule):
    """Safety-constrained alignment without pairs: in rounds, the policy draws prompts and learns from its own images.

    A round draws its prompts with the sampling policy, a moving average of the policy; scores the images by the cost
    model and, if there is one, a quality scorer; explores where a prompt got no safe image; moves lambda; and trains
    some passes by `DiffusionNFT`. What is drawn follows from the seed, the round and the weights. It is kept in
    `rounds/` in the run's folder, beside the checkpoints, and a checkpoint holds what it is drawn with, so a run that
    was killed goes on to the same bits, and without the files as well.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        prompts: file of prompts to draw, as `evaluate` reads it; the column `kind` says which are harmful. Nothing
            that a report calls held out or unnamed may stand in it.
        cost_model: folder of the cost model that scores images; above 0 is harmful.
        ensemble: folders of further cost models; the cost is then the mean plus ``pessimism`` standard deviations.
        pessimism: how many.
        scorer: what gives images quality: a class such as `lit_safety.generation.ClipScorer`; null: every image of a
            prompt as it is has the same quality.
        reports: folders of judges and CLIPs that reports on this model score with. None of them may be a reward.
        harmless: share of a round's prompts that are harmless ones of the file, to keep or raise their quality; needs
            a ``scorer``. Without it only `anchors` hold harmless prompts.
        rollout: how images are drawn.
        explore: how images are drawn for prompts without a safe one; null: nothing is explored.
        ema: how much of the sampling policy stays when a round begins; the rest is the policy. In [0, 1).
        objective: `lit_safety.objectives.DiffusionNFT`, with the constraint.

    Raises:
        ValueError: a number is outside its range, or two settings contradict each other.
    """

    objective: DiffusionNFT

    def __init__(
        self,
        pretrained: str,
        prompts: str,
        cost_model: str,
        ensemble: list[str] | None = None,
        pessimism: float = 1.0,
        scorer: Scorer | None = None,
        reports: list[str] | None = None,
        harmless: float = 0.0,
        rollout: Rollout | None = None,
        explore: Explore | None = None,
        ema: float = 0.3,
        objective: DiffusionNFT | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, objective or DiffusionNFT(), **settings)
        if not isinstance(self.objective, DiffusionNFT):
            raise ValueError(
                f"OnlineSCDPO learns by DiffusionNFT; `model.init_args.objective` is {type(self.objective).__name__}"
            )
        for name, given in (
            ("adversary", self.attack),
            ("speed.selective", self.speed.selective),
            ("stability", None if type(self.steps) is PlainSteps else self.steps),
            ("prompt_dropout", self.prompt_dropout or None),
        ):
            if given is not None:
                raise ValueError(f"`model.init_args.{name}` acts on pairs, and OnlineSCDPO has none: leave it out")
        if getattr(self.backbone_settings, "assistant", None) is not None:
            raise ValueError(
                "`model.init_args.backbone.init_args.assistant` is left out of drawing, and OnlineSCDPO trains what "
                "draws: leave it out, and train the student's base"
            )
        if not 0 <= ema < 1 or not 0 <= harmless < 1 or not 0 <= pessimism < float("inf"):
            raise ValueError(
                f"ema and harmless must lie in [0, 1), pessimism not be negative, got {ema}, {harmless}, {pessimism}"
            )
        if harmless > 0 and scorer is None:
            raise ValueError(
                "`model.init_args.harmless` draws harmless prompts for their quality: name a `scorer`, or set it to 0"
            )
        self.prompts, self.cost_model, self.ensemble, self.pessimism = prompts, cost_model, ensemble or [], pessimism
        self.quality, self.reports, self.harmless = scorer, reports or [], harmless
        self.rollout, self.explore, self.ema = rollout or Rollout(), explore, ema
        self._cost: CostScorer | CostEnsemble | None = None
        self._harmful: list[Prompt] = []
        self._harmless: list[Prompt] = []
        self._words = Words([])
        self._halves = False
        self._number = -1
        """The round at hand."""
        self._old: dict[str, Tensor] = {}
        """The weights of the sampling policy."""
        self._round: Round | None = None
        self._rows: list[Prompt] = []
        self._rewards = torch.empty(0)
        self._texts: Conditioning = {}
        self._empty: Conditioning = {}

    # ---- before anything is loaded ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        from lit_safety.backbones.call import passes_of
        from lit_safety.backbones.pipeline_index import pipeline_class_name
        from lit_safety.drawing.prompts import read_prompts

        if stage != "fit":
            raise UserError(
                f"OnlineSCDPO has no pairs to {stage} with: draw and judge what it exports with `evaluate --adapter`"
            )
        kind = pipeline_class_name(self.pretrained)
        if not isinstance(datamodule_of(self.trainer), Rounds):
            raise UserError("OnlineSCDPO draws its own images: set `data.class_path` to lit_safety.data.RoundData")
        self.check_trainer()
        if weights_are_sharded(self.trainer):
            raise UserError(
                "OnlineSCDPO exchanges whole weights, and here they are sharded over ranks: train with "
                "`configs/strategies/ddp.yaml`"
            )
        passes = passes_of(kind, self.rollout.guidance)
        # One pass with the prompt: the scale is an input of the network, and its prediction is the policy.
        self._halves = self.rollout.guidance > 1 and passes != [(True,)]
        if self._halves and passes != [(False, True)]:
            raise UserError(
                f"`model.init_args.rollout.guidance` is {self.rollout.guidance:g}, and {kind} guides in a way of its "
                "own: set it to 1"
            )
        self._harmful, self._harmless = sorted_prompts(read_prompts(self.prompts), self.prompts)
        if self.harmless > 0 and not self._harmless:
            raise UserError(f"`model.init_args.prompts` {self.prompts}: holds 0 harmless prompts (column kind)")
        if self.explore is not None and self.explore.ways and not self._harmless:
            raise UserError(
                f"`model.init_args.explore.init_args.ways`: drop and nearest compare with harmless prompts, and "
                f"{self.prompts} holds none (column kind): add some, or explore by guards"
            )
        self._words = Words([row.prompt for row in self._harmless])
        self._load_rewards()

    def _load_rewards(self) -> None:
        """Load the cost model, after a look at whether a report would measure with what is optimised here."""
        from lit_safety.cost_model.files import check_border, load_cost_model
        from lit_safety.drawing.worlds import paths_in

        models = [self.cost_model, *self.ensemble]
        for one in models:
            check_border(one, f"`model.init_args.{'cost_model' if one is models[0] else 'ensemble'}`")
        rewards = {
            one: "model.init_args.cost_model" if one is models[0] else "model.init_args.ensemble" for one in models
        }
        if self.quality is not None:
            named = [value for value in self.quality.settings.values() if isinstance(value, str)]  # hub ids too
            rewards |= dict.fromkeys([*named, *paths_in(self.quality.settings)], "model.init_args.scorer")
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        judges = [judge for one in callbacks if isinstance(judge := vars(one).get("judge"), str)]
        refuse_rewards(rewards, [*self.reports, *judges])
        if self.ensemble:
            from lit_safety.cost_model.ensemble import load_ensemble

            self._cost = load_ensemble(models, self.pessimism)
        else:
            self._cost = load_cost_model(self.cost_model)

    # ---- the two policies ----------------------------------------------------------------------------------------

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, the denoiser is the sampling policy; left before any backward pass."""
        trained = dict(self.trainable_parameters())
        self._exchange(trained)
        try:
            yield
        finally:
            self._exchange(trained)

    def _exchange(self, trained: dict[str, torch.nn.Parameter]) -> None:
        torch.clear_autocast_cache()  # it keeps casts of what is trained by the parameter, whatever that holds
        for name, parameter in trained.items():
            copy = self._old[name].to(parameter.device)
            self._old[name], parameter.data = parameter.data, copy

    def prediction(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the policy in place predicts (B, C, h, w): guided where it draws with guidance."""
        if not self._halves:
            return self.backbone.predict(noisy, timesteps, conditioning)
        empty = {name: rows.to(noisy.device).expand_as(conditioning[name]) for name, rows in self._empty.items()}
        both = {name: torch.cat([empty[name], rows]) for name, rows in conditioning.items()}
        without, prompted = self.backbone.predict(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        return without + self.rollout.guidance * (prompted - without)

    # ---- rounds --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        self._enter(places_of(batch.keys[0])[0])

    def _enter(self, number: int) -> None:
        """Have the images of round ``number``: those that a checkpoint's run drew, or new ones."""
        if number == self._number and self._round is not None:
            return
        began, fresh = time.monotonic(), number != self._number
        if fresh:
            self._follow()
            self._number = number
        data = self._rounds()
        self._rows = self._prompts(data, number)
        with torch.no_grad():
            self._encode()
            found = self._kept(data) or self._draw(data)
        self._round = found
        if fresh:
            self._move_dual(found)
        self._rewards = self._reward(found)
        if fresh and self.trainer.is_global_zero:
            self._tell(found, time.monotonic() - began)

    def _rounds(self) -> Rounds:
        data = datamodule_of(self.trainer)
        assert isinstance(data, Rounds)
        return data

    def _follow(self) -> None:
        """The sampling policy follows the policy."""
        with torch.no_grad():
            for name, parameter in self.trainable_parameters():
                if name in self._old:
                    self._old[name] = self._old[name].to(parameter.device).lerp(parameter, 1 - self.ema)
                else:
                    self._old[name] = parameter.detach().clone()

    def _prompts(self, data: Rounds, number: int) -> list[Prompt]:
        tame = round(self.harmless * data.prompts_per_round)
        rows = round_prompts(self._harmful, data.prompts_per_round - tame, data.seed, number)
        return rows + (round_prompts(self._harmless, tame, data.seed, number, "harmless") if tame else [])

    def _encode(self) -> None:
        texts = [row.prompt for row in self._rows]
        parts = [
            {name: rows.cpu() for name, rows in self.encode_text(texts[i : i + _AT_ONCE]).items()}
            for i in range(0, len(texts), _AT_ONCE)
        ]
        self._texts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self._halves:
            self._empty = self.encode_text([""])

    def identity(self, data: Rounds) -> str:
        """What a round's images follow from, as one word."""
        from lit_safety.core.hashes import content_sha256, digest

        explore = None
        if self.explore is not None:
            explore = [self.explore.names, self.explore.share, [guard.settings for guard in self.explore.guards]]
        said = {
            "version": 2,
            "round": self._number,
            "seed": data.seed,
            "images": data.images_per_prompt,
            "prompts": [(row.prompt, row.kind) for row in self._rows],
            "harmless": self._words.harmless,
            "weights": weights_digest(self._old),
            "rollout": [self.rollout.steps, self.rollout.guidance, self.rollout.batch_size],
            "drawing": [self.drawing.guidance, self.drawing.resolution],
            "explore": explore,
            # What is explored follows from costs, and they are kept with the images.
            "pretrained": self.pretrained,
            "costs": [*map(content_sha256, [self.cost_model, *self.ensemble]), self.pessimism],
            "quality": None if self.quality is None else [type(self.quality).__name__, self.quality.settings],
        }
        return str(digest(said))

    def _folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / "rounds"

    def _kept(self, data: Rounds) -> Round | None:
        """What was drawn of this round by the run that is resumed; the same on all ranks."""
        found = None
        if self.trainer.is_global_zero and self.trainer.ckpt_path is not None:
            found = Round.read(self._folder(), self._number, self.identity(data))
        return self.trainer.strategy.broadcast(found)

    def _draw(self, data: Rounds) -> Round:
        """Draw and score the round on all ranks."""
        images, number, rows = data.images_per_prompt, self._number, self._rows
        first = first_images(images, self.explore)
        places: dict[tuple[int, int], tuple[Slot, Tensor, Tensor, Tensor]] = {}

        def draw(slots: list[Slot]) -> None:
            latents, cost, quality = self._drawn(slots)
            for row, slot in enumerate(slots):
                places[slot.prompt, slot.image] = (slot, latents[row], cost[row], quality[row])

        def unsafe(which: Sequence[int], images: range) -> list[int]:
            return [prompt for prompt in which if min(float(places[prompt, image][2]) for image in images) > 0]

        draw(first_slots(rows, first, data.seed, number))
        if first < images:
            assert self.explore is not None
            others = range(first, images)
            left = unsafe([prompt for prompt, row in enumerate(rows) if row.harmful], range(first))
            draw(more_slots(rows, sorted(set(range(len(rows))) - set(left)), others, data.seed, number))
            for way in self.explore.names:
                draw(explored_slots(rows, left, others, way, self._words, data.seed, number))
                left = unsafe(left, others)
        found = [places[place] for place in sorted(places)]
        latents = torch.stack([one[1] for one in found])
        cost, quality = torch.stack([one[2] for one in found]), torch.stack([one[3] for one in found])
        made = Round(number, self.identity(data), [one[0] for one in found], latents, cost, quality)
        if self.trainer.is_global_zero:
            made.write(self._folder())
            round_file(self._folder(), number - _KEPT).unlink(missing_ok=True)
        return made

    def _drawn(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Latents (N, C, h, w), costs and quality (N,) of what all ranks draw together, on the CPU."""
        size = self.rollout.batch_size
        kinds: dict[tuple[bool, str], list[int]] = {}
        for place, slot in enumerate(slots):
            own = slot.own or slot.way in ("drop", "nearest")
            kinds.setdefault((slot.own, OWN if own else slot.way), []).append(place)
        # The same batches for any number of ranks, since the last digits of pixels depend on the batch.
        jobs = [
            (own, way, places[start : start + size])
            for (own, way), places in sorted(kinds.items())
            for start in range(0, len(places), size)
        ]
        mine = jobs[self.trainer.global_rank :: self.trainer.world_size]
        results: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for own, policy in ((True, self.sampling), (False, self.reference)):
            with policy():
                results |= self._draw_jobs([(way, places) for kind, way, places in mine if kind is own], slots)
        if not slots:  # of all ranks alike
            return [torch.empty(0), torch.empty(0), torch.empty(0)]
        shape = next(iter(results.values()))[0].shape[1:] if results else None
        shapes = [one for one in self._everywhere(shape) if one is not None]
        whole = [torch.zeros(len(slots), *shapes[0]), torch.zeros(len(slots)), torch.zeros(len(slots))]
        for start, found in results.items():
            places = next(places for _, _, places in mine if places[0] == start)
            for into, part in zip(whole, found, strict=True):
                into[places] = part
        # Each place was drawn by one rank and is 0 elsewhere, so that the sum is exact.
        strategy: Any = self.trainer.strategy
        return [strategy.reduce(one.to(self.device), reduce_op="sum").cpu() for one in whole]

    def _everywhere(self, value: Any) -> list[Any]:
        if self.trainer.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    def _draw_jobs(
        self, jobs: Sequence[tuple[str, list[int]]], slots: Sequence[Slot]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """First place of a batch -> latents, costs and quality of its images, drawn by the policy in place."""
        from lit_safety.drawing.gallery import DrawingSettings, draw_batch
        from lit_safety.drawing.threads import each_batch

        if not jobs:
            return {}
        pixels: dict[int, np.ndarray] = {}
        pipe = self.backbone.pipeline()
        settings = DrawingSettings(self.rollout.steps, self.rollout.guidance, resolution=self.drawing.resolution)

        def work(own_pipe: Any, numbers: range) -> int:
            way, places = jobs[numbers.start]
            guard = None if self.explore is None else self.explore.guard(way)
            scale = self.rollout.guidance
            if guard is not None:
                guard.check(own_pipe)
                scale = max(scale, self.drawing.guidance)  # guards act on guidance
            temperature = 1.0
            if self.explore is not None:
                scale = self.explore.guidance.get(way, scale)
                temperature = self.explore.temperature.get(way, 1.0)
            asked = [
                replace(
                    self._rows[slots[i].prompt], prompt=slots[i].text, seed=slots[i].seed, guidance=scale, user=None
                )
                for i in places
            ]
            pixels[numbers.start] = draw_batch(own_pipe, asked, settings, None, guard, temperature)
            return len(numbers)

        for _ in each_batch(pipe, [range(i, i + 1) for i in range(len(jobs))], work, None):
            pass
        return {
            places[0]: self._looked_at(pixels[number], [slots[i] for i in places])
            for number, (_, places) in enumerate(jobs)
        }

    def _looked_at(self, pixels: np.ndarray, slots: Sequence[Slot]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, costs and quality of a batch of pixels (B, H, W, 3) in [0, 1].

        Raises:
            UserError: the policy drew no numbers, or an image cannot be scored: neither may count as safe.
        """
        import numpy as np
        from PIL import Image

        from lit_safety.data.reading.decode import to_tensor

        if not np.isfinite(pixels).all():
            raise UserError(
                f"round {self._number}: the sampling policy drew numbers that are not finite: lower the learning rate, "
                "or raise `ema`"
            )
        images = [Image.fromarray((one * 255).round().clip(0, 255).astype(np.uint8)) for one in pixels]
        for image, slot in zip(images, slots, strict=True):
            if slot.prompt < SHOWN:
                keep_image(self._folder(), self._number, slot, image)
        assert self._cost is not None
        costs = self._cost.to(self.device).costs(images).float().cpu()
        if not bool(costs.isfinite().all()):
            raise UserError(f"the cost model {self.cost_model} cannot score the policy's images: a cost is not finite")
        prompts = [self._rows[slot.prompt].prompt for slot in slots]
        quality = torch.zeros(len(images))
        if self.quality is not None:
            quality = torch.tensor([float(one) for one in self.quality(images, prompts)])
            if not bool(quality.isfinite().all()):
                raise UserError(f"`model.init_args.scorer` {type(self.quality).__name__}: a score is not finite")
        posterior = self.backbone.posterior(torch.stack([to_tensor(image) for image in images]).to(self.device))
        latents = self.backbone.latents(posterior, torch.zeros_like(posterior[:, 0])).float().cpu()
        return latents, costs, quality

    # ---- rewards -------------------------------------------------------------------------------------------------

    def _expected(self, found: Round) -> tuple[list[float], list[int]]:
        """Costs of the images that the expected cost is the mean of, and their prompts."""
        counted = [
            (cost, slot.prompt) for cost, slot in zip(found.cost.tolist(), found.slots, strict=True) if slot.counts
        ]
        return [cost for cost, _ in counted], [prompt for _, prompt in counted]

    def _move_dual(self, found: Round) -> None:
        costs, prompts = self._expected(found)
        expected = sum(costs) / len(costs)
        excess = rectified_excess(costs, [str(prompt) for prompt in prompts], self.objective.limit)
        dual = self.objective.update(expected, excess)
        logs = {"cost": expected, "excess": excess, "dual": dual, "harm": sum(cost > 0 for cost in costs) / len(costs)}
        self.log_dict({f"online/{name}": torch.tensor(value) for name, value in logs.items()}, batch_size=1)

    def _reward(self, found: Round) -> Tensor:
        """r of each image, in the order of places."""
        penalty = 0.0 if self.explore is None else self.explore.penalty
        quality = found.quality - penalty * torch.tensor([1 - slot.kept for slot in found.slots])
        own = [slot.own for slot in found.slots]
        return self.objective.rewards(quality, found.cost, [slot.prompt for slot in found.slots], own)

    # ---- a step --------------------------------------------------------------------------------------------------

    def ordered(self, batch: PairBatch) -> PairBatch:
        """The batch with the prompts of its places."""
        rows = [self._rows[places_of(key)[1]] for key in batch.keys]
        clean = torch.tensor([0.0 if row.harmful else 1.0 for row in rows]).to(batch.clean)
        kinds = ["harmful" if row.harmful else "clean" for row in rows]
        # An explored image shares timestep and noise with the one whose initial noise it has.
        first = first_images(self._rounds().images_per_prompt, self.explore)
        seeds = [
            derive(seed, f"column {column(places_of(key)[2], first)}")
            for seed, key in zip(batch.noise_seeds, batch.keys, strict=True)
        ]
        prompts = [row.prompt for row in rows]
        return replace(batch, prompts=prompts, prompt_kinds=kinds, clean=clean, fixed_seeds=seeds)

    def _places(self, batch: PairBatch) -> list[int]:
        assert self._round is not None
        each = len(self._round.slots) // len(self._rows)
        return [prompt * each + image for _, prompt, image in map(places_of, batch.keys)]

    def errors(self, batch: PairBatch) -> PairErrors:
        """Errors of v+ and v- in the place of chosen and rejected, of v_old in that of the reference."""
        assert self._round is not None
        places = self._places(batch)
        prompts = [self._round.slots[place].prompt for place in places]
        with torch.no_grad():
            latents = self._round.latents[places].to(self.device, non_blocking=True)
            noise = self.gaussian(batch, NOISE, tuple(latents.shape[1:]))
            fractions = torch.tensor([uniform(seed, TIMESTEP) for seed in batch.noise_seeds], dtype=torch.float64)
            size = latents.shape[-2], latents.shape[-1]
            timesteps = self.backbone.timesteps(fractions, size).to(self.device, non_blocking=True)
            noisy = self.backbone.add_noise(latents, noise, timesteps)
            target = self.backbone.target(latents, noise, timesteps)
            texts = {name: rows[prompts].to(self.device, non_blocking=True) for name, rows in self._texts.items()}
            with self.sampling():
                old = self.prediction(noisy, timesteps, texts)
            reference = None
            if self.objective.needs_drift:
                with self.reference():
                    reference = self.prediction(noisy, timesteps, texts)
        policy = self.prediction(noisy, timesteps, texts)
        drift = None if reference is None else prediction_error(policy, reference)
        positive, negative = nft_errors(policy, old, target, self.objective.strength)
        before = prediction_error(old, target)
        return PairErrors(positive, negative, before, before, drift)

    def labels(self, batch: PairBatch) -> PairLabels:
        """With the rewards of the batch's places."""
        reward = self._rewards[self._places(batch)].to(self.device, non_blocking=True)
        return PairLabels(clean=batch.clean, harmful=batch.harmful, cost=batch.cost, score=batch.score, reward=reward)

    # ---- what a round leaves to be looked at ---------------------------------------------------------------------

    def _tell(self, found: Round, seconds: float) -> None:
        """Append the round to rounds.jsonl and write the page again."""
        costs, _ = self._expected(found)
        spread = float(torch.tensor(costs, dtype=torch.float64).std()) if len(costs) > 1 else 0.0
        ways = Counter(slot.way for slot in found.slots)
        safe = Counter(slot.way for slot, cost in zip(found.slots, found.cost.tolist(), strict=True) if cost <= 0)
        expected = sum(costs) / len(costs)
        said = {
            "round": found.number,
            "step": self.global_step,
            "images": len(found.slots),
            "expected_cost": round(expected, 4),
            "standard_error": round(spread / len(costs) ** 0.5, 4),
            "limit": self.objective.limit,
            "lambda": round(self.objective.dual, 6),
            "harmful_share": round(sum(cost > 0 for cost in costs) / len(costs), 4),
            "ways": {way: {"images": count, "safe": safe[way]} for way, count in sorted(ways.items())},
            "prompts_without_safe": sum(
                all(cost > 0 for slot, cost in zip(found.slots, found.cost.tolist(), strict=True) if slot.prompt == one)
                for one in range(len(self._rows))
            ),
            "seconds": round(seconds, 1),
        }
        print(
            f"round {found.number}: {said['harmful_share']:.1%} of {len(costs)} own images harmful, expected cost "
            f"{expected:.2f} (limit {self.objective.limit:g}), lambda {self.objective.dual:.3f}, "
            f"{said['prompts_without_safe']} of {len(self._rows)} prompts without a safe image, {seconds:.0f} s"
        )
        shown = [
            Seen(slot, self._rows[slot.prompt].prompt, round(cost, 2))
            for slot, cost in zip(found.slots, found.cost.tolist(), strict=True)
            if slot.prompt < SHOWN
        ]
        write_round(self._folder(), said, shown)
        write_page(self._folder(), self.pretrained)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        old = {name: value.cpu().clone() for name, value in self._old.items()}
        checkpoint["online"] = {"round": self._number, "sampling": old}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("online")
        if state is None:
            raise UserError(
                "the checkpoint is none of OnlineSCDPO: begin from its weights, `model.init_args.start_from`"
            )
        self._number, self._old, self._round = int(state["round"]), dict(state["sampling"]), None
