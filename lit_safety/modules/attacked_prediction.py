"""The policy's prediction on a batch that adversaries disturb: their search, and how its result is applied.

Several adversaries search together: each sign step changes all their disturbances by one gradient. Nothing is read back
from the device. The host knows which pairs are attacked, and a pair's search does not depend on other pairs. So the
result is the same for a batch, for its halves and on several ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.chance import derive, normal, uniform
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import PairData, datamodule_of
from lit_safety.modules.adversary import KEY, SignSteps
from lit_safety.modules.step_parts import Adversary
from lit_safety.modules.strategies import family, weights_are_sharded
from lit_safety.objectives.objective import prediction_error

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone, Conditioning
    from lit_safety.data.reading.batch import PairBatch


class Attacked(Protocol):
    """What an attack needs from the training module; `PreferenceModule` provides it."""

    backbone: Backbone
    speed: Any
    training: bool
    _trainer: Any

    @property
    def global_step(self) -> int: ...

    def dropped_prompts(self, batch: PairBatch) -> list[bool]: ...

    def all_gather(self, data: Any) -> Any: ...

    def log_dict(self, dictionary: Any, *, batch_size: int) -> None: ...


class Attack:
    """The adversaries of a run, as `PreferenceModule` uses them.

    Args:
        adversary: one adversary or several.

    Raises:
        ValueError: the module trains on a part of the pairs (`speed.selective`), so that pairs would be attacked twice.
    """

    def __init__(self, adversary: Adversary | Sequence[Adversary], selective: bool = False) -> None:
        self.parts: Sequence[Any] = [adversary] if isinstance(adversary, Adversary) else list(adversary)
        if self.parts and selective:
            raise ValueError("adversary and speed.selective: pairs would be attacked twice; set one of them to null")
        self._waits = False

    def check(self, module: Attacked) -> None:
        """Check that every adversary can disturb this model and this data under this strategy.

        Raises:
            UserError: an adversary cannot.
        """
        theirs = family(module._trainer.strategy)
        if theirs != family(SingleDeviceStrategy()):
            raise UserError(
                f"`{KEY}`: the search runs a backward pass inside a step, which was not tested under {theirs}: set it "
                "to null, or use one process or `--config configs/strategies/ddp.yaml`"
            )
        data = datamodule_of(module._trainer)
        sources = data.caches("fit") if isinstance(data, PairData) else []
        cached = [source.key for source in sources if source.key.endswith("train")]
        for one in self.parts:
            one.check(module.backbone, cached, module.speed.compile is not None)

    def predict(
        self, module: Attacked, batch: PairBatch, noised: tuple[Tensor, Tensor, Tensor, Conditioning]
    ) -> Tensor:
        """The policy's prediction (2B, C, h, w) on the output of `noised`, under attack in a training step.

        There is no attack in validation, nor in a probe before training.
        """
        trainer = module._trainer
        if self._waits or not module.training or not (trainer is None or trainer.training):
            noisy, timesteps, _, conditioning = noised
            return module.backbone.predict(noisy, timesteps, conditioning)
        sharded = trainer is not None and weights_are_sharded(trainer)
        policy, logs = predict_attacked(module, self.parts, batch, noised, sharded)
        if trainer is not None:
            module.log_dict(logs, batch_size=len(batch))
        return policy

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context without attacks."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def turn(self, module: Attacked, batch_idx: int) -> None:
        """Called on all ranks after each batch's backward pass; updates memories at the end of an optimizer step."""
        trainer = module._trainer
        # DeepSpeed accumulates by itself, so it is asked after every micro-batch.
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return

        def gather(values: Tensor) -> Tensor:
            if trainer.world_size == 1:
                return values
            gathered: Tensor = module.all_gather(values)
            return gathered.flatten(0, 1)

        for one in self.parts:
            one.turn(gather)

    def state_dict(self) -> list[dict[str, Any]]:
        """The adversaries' memories, for the checkpoint."""
        return [one.state_dict() for one in self.parts]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore the memories from a checkpoint.

        Raises:
            UserError: the checkpoint's run had other adversaries.
        """
        after = "resume with the config.yaml of that run"
        if len(states) != len(self.parts):
            raise UserError(
                f"`{KEY}` names {len(self.parts)} adversaries, but the checkpoint's run had {len(states)}: {after}"
            )
        for one, state in zip(self.parts, states, strict=True):
            try:
                one.load_state_dict(state)
            except ValueError as error:
                raise UserError(f"`{KEY}`: {error}: {after}") from error


class Moved:
    """One adversary's disturbances of the pairs of one batch, by name, in standard deviations.

    Args:
        part: the adversary.
        number: its index among the run's adversaries; each has its own random numbers.
        batch: the pairs.
        dropped: which pairs are trained on the empty prompt; these are not disturbed.
        optimizer_steps: how many were done so far.
        device: device of the disturbances.
    """

    def __init__(
        self,
        part: SignSteps,
        number: int,
        batch: PairBatch,
        dropped: Sequence[bool],
        optimizer_steps: int,
        device: torch.device,
    ) -> None:
        self.part, self.batch, self.device = part, batch, device
        self.purpose = f"adversary-{number}"
        scale = part.scale(optimizer_steps)
        self.radius, self.step = part.radius * scale, part.step * scale
        self.attacked: list[int] = []
        self.disturbed: list[int] = []
        for row, (seed, kind, no) in enumerate(zip(batch.seeds, batch.prompt_kinds, dropped, strict=True)):
            u = uniform(seed, self.purpose)
            if kind == "harmful" and u < part.share and not no:
                self.attacked.append(row)
            elif kind == "clean" and u < part.clean_share and part.noise > 0 and not no:
                self.disturbed.append(row)
        self.attempt = 0
        self.found: dict[str, Tensor] = {}
        """The found disturbances by name, each (attacked pairs, *shape)."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The shape of each disturbance by name, also where none was found."""
        self.searching = False

    def seeds(self, rows: Sequence[int]) -> list[int]:
        return [self.batch.seeds[row] for row in rows]

    def touched(self, rows: Sequence[int]) -> list[int]:
        """Those of ``rows`` that the adversary disturbs in the current pass."""
        mine = {*self.attacked, *([] if self.searching else self.disturbed)}
        return [row for row in rows if row in mine]

    def disturbance(self, name: str, shape: tuple[int, ...], rows: Sequence[int]) -> Tensor:
        """The disturbance of each of ``rows`` in standard deviations: (rows, *shape), 0 for all other pairs."""
        full = torch.zeros(len(rows), *shape, device=self.device)
        if self.attacked:
            if name not in self.found:
                self.found[name] = self._start(name, shape)
            places = [rows.index(row) for row in self.attacked]
            full = full.index_copy(0, index(places, self.device), self.found[name])
        if self.disturbed and not self.searching:
            places = [rows.index(row) for row in self.disturbed]
            noise = normal(self.seeds(self.disturbed), f"{self.purpose}-noise-{name}", shape)
            noise = (noise * (self.part.noise * self.radius)).clamp(-self.radius, self.radius)
            full = full.index_copy(0, index(places, self.device), noise.to(self.device, non_blocking=True))
        return full

    def _start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        start = torch.zeros(len(self.attacked), *shape)
        if self.part.start > 0:
            noise = normal(self.seeds(self.attacked), f"{self.purpose}-start-{self.attempt}-{name}", shape)
            start = noise * self.part.start
        found = start.to(self.device, non_blocking=True)
        if self.attempt == 0 and self.part.replay:
            found = self.part.replayed(self, name, found)  # type: ignore[attr-defined]  # it replays
        return found.clamp(-self.radius, self.radius).requires_grad_()

    def categories(self) -> list[int]:
        """The index of each attacked pair's first category; the number of categories for a pair without one."""
        return [
            CATEGORIES.index(found[0]) if (found := self.batch.categories[row]) else len(CATEGORIES)
            for row in self.attacked
        ]

    def order(self) -> list[int]:
        """A number for each attacked pair, by which pairs of several batches are sorted."""
        return [derive(seed, f"{self.purpose}-order") for seed in self.seeds(self.attacked)]


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def predict_attacked(
    module: Attacked,
    parts: Sequence[SignSteps],
    batch: PairBatch,
    noised: tuple[Tensor, Tensor, Tensor, Conditioning],
    sharded: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's prediction (2B, C, h, w) on the disturbed batch, and what to log about the search.

    Args:
        module: the training module.
        parts: the adversaries.
        batch: the pairs.
        noised: x_t, timesteps, targets and conditioning of 2B rows: chosen, then rejected.
        sharded: whether each rank holds a part of the weights; then every rank runs the search, even without attacked
            pairs.
    """
    noisy, timesteps, target, conditioning = noised
    dropped = module.dropped_prompts(batch)
    moved = [Moved(part, number, batch, dropped, module.global_step, noisy.device) for number, part in enumerate(parts)]
    rows = sorted({row for one in moved for row in one.attacked})
    logs: dict[str, Tensor] = {}
    if rows or sharded:
        before = _search(module.backbone, moved, batch, noised, rows or [0], sharded)
    everything = range(len(batch))
    with _applied(module.backbone, moved, batch.prompts, conditioning, everything) as given:
        policy = module.backbone.predict(noisy, timesteps, given)
    if rows:
        at = index(rows, noisy.device) + len(batch)
        with torch.no_grad():
            after = prediction_error(policy.index_select(0, at), target.index_select(0, at))
        logs = {"adversary/error_before": before.mean(), "adversary/error_after": after.mean()}
    for one in moved:
        one.part.remember(one)
    return policy, logs


def _search(
    backbone: Backbone,
    moved: Sequence[Moved],
    batch: PairBatch,
    noised: tuple[Tensor, Tensor, Tensor, Conditioning],
    rows: Sequence[int],
    sharded: bool,
) -> Tensor:
    """Search for what lowers the error on the rejected images of ``rows``; returns the first errors (rows,)."""
    noisy, timesteps, target, conditioning = noised
    at = index(rows, noisy.device) + len(batch)
    noisy, timesteps, target = (one.detach().index_select(0, at) for one in (noisy, timesteps, target))
    given = {name: values.detach().index_select(0, at) for name, values in conditioning.items()}
    prompts = [batch.prompts[row] for row in rows]
    if sharded:  # every rank must run a backward pass through every block, whatever is disturbed
        noisy = noisy.requires_grad_()
    before: Tensor | None = None
    best: Tensor | None = None
    kept: list[dict[str, Tensor]] = [{} for _ in moved]
    attempts = max(one.part.restarts for one in moved)

    def errors() -> Tensor:
        with _applied(backbone, moved, prompts, given, rows) as disturbed:
            return prediction_error(backbone.predict(noisy, timesteps, disturbed), target)

    for one in moved:
        one.searching = True
    for attempt in range(attempts):
        for one in moved:
            if attempt < one.part.restarts:
                one.attempt, one.found = attempt, {}
        for step in range(max(one.part.steps for one in moved)):
            with torch.enable_grad():
                error = errors()
                leaves = [(one, name, leaf) for one in moved for name, leaf in one.found.items()]
                wanted = [leaf for *_, leaf in leaves] + ([noisy] if sharded else [])
                # `grad` and not `backward`: weights must get no gradient, and their hooks must not run. The errors are
                # summed over an image's numbers, because float16 would round the gradient of a mean to 0; the sign is
                # the same.
                slopes = torch.autograd.grad(error.sum() * target[0].numel(), wanted, allow_unused=True)
            _check_reached(moved, leaves, slopes)
            before = error.detach() if before is None else before
            for (one, name, leaf), slope in zip(leaves, slopes, strict=False):
                if slope is not None and step < one.part.steps and attempt < one.part.restarts:
                    lowered = leaf.detach() - one.step * slope.sign()
                    one.found[name] = lowered.clamp(-one.radius, one.radius).requires_grad_()
        if attempts > 1:
            with torch.no_grad():
                found = errors()
                better = torch.ones_like(found, dtype=torch.bool) if best is None else found < best
                best = found if best is None else torch.minimum(best, found)
            for number, one in enumerate(moved):
                mine = better.index_select(0, index([rows.index(row) for row in one.attacked], noisy.device))
                for name, leaf in one.found.items():
                    now = leaf.detach()
                    where = mine.view(-1, *[1] * (now.ndim - 1))
                    kept[number][name] = torch.where(where, now, kept[number].get(name, now))
    for number, one in enumerate(moved):
        found_ = kept[number] if attempts > 1 else one.found
        one.found = {name: leaf.detach() for name, leaf in found_.items()}
        one.searching = False
    assert before is not None
    return before


def _check_reached(
    moved: Sequence[Moved], leaves: Sequence[tuple[Moved, str, Tensor]], slopes: Sequence[Tensor | None]
) -> None:
    """Refuse an adversary whose disturbance does not change the prediction; no value is read from the device for this.

    Raises:
        UserError: names the adversary.
    """
    reached = [one for (one, *_), slope in zip(leaves, slopes, strict=False) if slope is not None]
    for one in moved:
        if one.attacked and one not in reached:
            raise UserError(f"`{KEY}`: {type(one.part).__name__} does not change the prediction: leave it out")


@contextmanager
def _applied(
    backbone: Backbone,
    moved: Sequence[Moved],
    prompts: Sequence[str],
    conditioning: Conditioning,
    rows: Sequence[int],
) -> Iterator[Conditioning]:
    """A context in which all adversaries act at once; those that encode the text again act first."""
    with ExitStack() as stack:
        given = conditioning
        for one in sorted(moved, key=lambda one: not getattr(one.part, "tokens", 0)):
            given = stack.enter_context(one.part.on(one, backbone, prompts, given, rows))
        yield given
