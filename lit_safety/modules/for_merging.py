"""Training that prepares the merge: a special initialisation (OSRM), and merges between rounds (MapReduce)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_safety.adapters.expert_bank import ExpertBank
from lit_safety.adapters.lora import LoRA
from lit_safety.adapters.low_rank import LowRank, factors_of, squared_norm
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import WithTrain, datamodule_of
from lit_safety.merging.options import CalibrationOptions, Recipe

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone
    from lit_safety.merging.experts import Expert

KEY = "model.init_args.for_merging"


class Experts(Protocol):
    """What `ForMerging` needs from the module; `DPOExpert` provides it."""

    backbone: Backbone
    bank: ExpertBank
    lora: LoRA
    pretrained: str
    start_from: str | None


class ForMerging:
    """How experts are trained so that they merge better.

    Args:
        init: lora draws every A as `lora.init` says. osrm (ACL 2025) chooses A in the directions where the other
            categories' inputs are smallest: the eigenvectors of the smallest eigenvalues of their covariance, which is
            measured before the first step along the base's sampling path.
        rounds: MapReduce (CVPR 2026): the run is divided into this many equal parts. Between two parts the experts are
            merged, and each continues from the merge, reduced to the rank of `lora`, with a fresh optimizer. The
            learning rate schedule covers the whole run. How much the reduction loses is printed and written into each
            expert's card.
        calibration: the prompts on which the base's inputs are measured; `prompts: null` takes those of the training
            shards.
        **settings: how experts are merged between rounds, see `Recipe`.

    Raises:
        UserError: a number is outside its range.
    """

    def __init__(
        self,
        init: Literal["lora", "osrm"] = "lora",
        rounds: int = 1,
        calibration: CalibrationOptions | None = None,
        **settings: Any,
    ) -> None:
        if rounds < 1:
            raise UserError(f"`{KEY}.rounds` {rounds}: must be at least 1")
        self.init, self.rounds = init, rounds
        self.calibration = calibration or CalibrationOptions()
        self.recipe = Recipe(**settings)
        self.merged = 0
        """How many merges were made so far."""
        self.left_out: list[float] = []
        """For every merge, what the reduction to the experts' rank lost: a relative Frobenius norm."""
        self._begun = False

    # ---- during a run

    def check(self, module: Experts, trainer: Trainer, consecutive: bool) -> None:
        """Refuse before the first step what would fail later.

        Raises:
            UserError: there is only one expert, the strategy does not hold whole weights, or prompts are missing.
        """
        names = module.bank.names
        if self.init == "lora" and self.rounds == 1:
            return
        if len(names) == 1:
            raise UserError(f"`{KEY}`: there is only one expert, {names[0]}, so nothing can be merged: leave it out")
        if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
            raise UserError(f"`{KEY}`: needs whole weights on every rank: train with ddp, or leave it out")
        if self.rounds > 1 and consecutive:
            raise UserError(f"`{KEY}.rounds`: experts must take turns: set `data.init_args.consecutive: false`")
        if self.init == "osrm" and module.start_from is not None:
            raise UserError(f"`{KEY}.init: osrm` and `start_from` both initialise the experts: set only one of them")
        if self.rounds > 1 and not 0 < trainer.estimated_stepping_batches < float("inf"):
            raise UserError(f"`{KEY}.rounds`: the run's length is not known: set `trainer.max_steps`")
        if self.init == "osrm" or self.recipe.clean_inputs:
            from lit_safety.merging.own_prompts import check_own_prompts

            looks = Recipe() if self.init == "osrm" else self.recipe
            check_own_prompts(self._source(trainer), names, looks, self.calibration)

    def begin(self, module: Experts, trainer: Trainer) -> None:
        """Put OSRM's initial weights into the bank, unless the run was resumed from a checkpoint."""
        if self.init != "osrm" or self._begun:
            return
        found = self._on_rank_0(trainer, lambda: self._osrm(module, trainer))
        module.bank.put(found)
        self._begun = True

    def before_step(self, module: Experts, trainer: Trainer) -> None:
        """If a round has ended, merge the experts and let each continue from the merge."""
        ends = round_ends(int(trainer.estimated_stepping_batches), self.rounds) if self.rounds > 1 else []
        while self.merged < len(ends) and trainer.global_step >= ends[self.merged]:
            weights, left_out = self._on_rank_0(trainer, lambda: self._merge(module, trainer))
            module.bank.put(weights, trainer.optimizers[0])
            self.merged += 1
            self.left_out.append(left_out)
            rank_zero_info(
                f"round {self.merged} of {self.rounds} ended at step {trainer.global_step}: the experts continue from "
                f"their merge; the reduction to rank {module.lora.rank} loses {left_out:.3g} of it"
            )

    def settings(self) -> dict[str, Any]:
        """What an expert's card says about these settings."""
        told: dict[str, Any] = {} if self.init == "lora" else {"A begins in": "osrm"}
        if self.merged:
            told |= {"rounds": self.rounds, "left out by cuts": [round(one, 6) for one in self.left_out]}
        return told

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps in addition to the experts."""
        return {"begun": self._begun, "merged": self.merged, "left_out": list(self.left_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._begun, self.merged, self.left_out = state["begun"], state["merged"], list(state["left_out"])

    # ---- computation

    def _source(self, trainer: Trainer) -> str | list[str]:
        data = datamodule_of(trainer)
        source = self.calibration.prompts or (data.train if isinstance(data, WithTrain) else None)
        if source is None:
            raise UserError(f"`{KEY}.calibration.prompts` is not given, and the data names no training shards")
        return source

    @staticmethod
    def _on_rank_0(trainer: Trainer, compute: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[]):
            found = compute() if trainer.is_global_zero else None
        return trainer.strategy.broadcast(found)

    def _osrm(self, module: Experts, trainer: Trainer) -> dict[str, dict[str, Tensor]]:
        from lit_safety.merging.experts import Expert
        from lit_safety.merging.grams import look
        from lit_safety.merging.own_prompts import OwnPrompts, own_prompts

        names = sorted(module.bank.names)
        fresh = {name: {key: value.clone() for key, value in module.bank.weights(name).items()} for name in names}
        prompts = own_prompts(self._source(trainer), names, Recipe(), self.calibration)
        prompts = OwnPrompts(prompts.own, prompts.clean[:1])  # clean prompts are not needed here
        # Experts without an update: so the base itself runs once on each category's prompts.
        idle = [
            Expert(name, {layer: _without(part) for layer, part in self._expert(module, name).layers.items()})
            for name in names
        ]
        with _evaluating(module.backbone):
            for group in look(module.backbone, idle, prompts, Recipe(), self.calibration).groups:
                for layer, grams in group.items():
                    key = f"{layer.split('.', 1)[1]}.lora_A.{_adapter(fresh[names[0]])}.weight"
                    for number, name in enumerate(names):
                        others = sum(gram.double() for n, gram in enumerate(grams.own) if n != number)
                        drawn = fresh[name][key]
                        fresh[name][key] = osrm_start(drawn.flatten(1), torch.as_tensor(others)).reshape(drawn.shape)
        return fresh

    def _merge(self, module: Experts, trainer: Trainer) -> tuple[dict[str, dict[str, Tensor]], float]:
        from lit_safety.merging.run import run

        names = sorted(module.bank.names)
        experts = [self._expert(module, name) for name in names]
        source = self._source(trainer) if self.recipe.looks(len(names)) else None
        with _evaluating(module.backbone):
            done = run(experts, self.recipe, lambda: (module.backbone, module.pretrained), source, self.calibration)
        merged = done.merged[self.recipe.mu]
        fresh = {name: dict(module.bank.fresh(name)) for name in names}
        adapter = _adapter(fresh[names[0]])
        kept = lost = 0.0
        for layer, update in merged.layers.items():
            inner = layer.split(".", 1)[1]
            keys = [f"{inner}.lora_{side}.{adapter}.weight" for side in "AB"]
            rank, scale = module.lora.rank, module.lora.alpha / module.lora.rank
            for name in names:
                start = restart(update, fresh[name][keys[0]].flatten(1), rank, scale)
                for key, factor in zip(keys, factors_of(start), strict=True):
                    fresh[name][key] = factor.float().reshape(fresh[name][key].shape)
            kept += squared_norm(start)
            lost += max(0.0, squared_norm(update) - squared_norm(start))
        return fresh, (lost / (kept + lost)) ** 0.5 if kept + lost else 0.0

    @staticmethod
    def _expert(module: Experts, name: str) -> Expert:
        from lit_safety.merging.experts import Expert

        return Expert(name, updates(module.bank.weights(name), module.backbone.DENOISER, module.lora))


def round_ends(steps: int, rounds: int) -> list[int]:
    """The steps after which rounds end, without the last round."""
    return [-(-steps * number // rounds) for number in range(1, rounds)]


def osrm_start(drawn: Tensor, others: Tensor) -> Tensor:
    """A (r, in) in the directions that the other categories' inputs use least.

    Its rows are the eigenvectors of the r smallest eigenvalues of ``others``, so that |A X|^2 = tr(A others A^T) is the
    smallest that orthonormal rows can give. All rows are multiplied by one number that keeps the Frobenius norm.

    Args:
        drawn: A (r, in) as it is drawn without OSRM; rows beyond ``in`` keep it, and all rows if ``others`` is 0.
        others: sum of the other categories' X X^T (in, in).
    """
    if not bool(others.any()):
        return drawn
    _, vectors = torch.linalg.eigh(others.double())  # ascending
    rows = vectors[:, : len(drawn)].T
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    rows = rows * largest.sign()  # the library may choose an eigenvector's sign freely; this fixes it
    found = drawn.double().clone()
    found[: len(rows)] = rows * (found[: len(rows)].norm() / len(rows) ** 0.5)
    return found.to(drawn.dtype)


def restart(merged: LowRank, drawn: Tensor, rank: int, scale: float) -> LowRank:
    """The factors from which an expert continues after a merge: the merge's best approximation of this rank.

    Args:
        merged: the merged update.
        drawn: a freshly drawn A (rank, in), for rows that the merge does not need; B is 0 there.
        rank: the experts' rank.
        scale: the experts' alpha / rank.
    """
    from lit_safety.merging.methods import svd_truncate

    cut = svd_truncate(merged, rank)
    b = cut.b.double() * cut.scale
    a = cut.a.double()
    # A and B get the same size, so that one learning rate suits both
    sizes = (a.norm(dim=1) / b.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(1e-6, 1e6)
    a, b = a / sizes[:, None] / scale**0.5, b * sizes / scale**0.5
    free = rank - len(a)
    a = torch.cat([a, drawn[rank - free :].to(a)])
    b = torch.cat([b, b.new_zeros(len(b), free)], dim=1)
    return LowRank(a, b, scale, merged.kernel)


def updates(weights: Mapping[str, Tensor], component: str, lora: LoRA) -> dict[str, LowRank]:
    """The updates by layer of an adapter whose parameters are given by PEFT's names."""
    found = {}
    for key in sorted(weights):
        layer, mark, adapter = key.partition(".lora_A.")
        if mark:
            a, b = weights[key], weights[f"{layer}.lora_B.{adapter}"]
            factors = a.flatten(1).float().cpu(), b.flatten(1).float().cpu()
            found[f"{component}.{layer}"] = LowRank(*factors, lora.alpha / lora.rank, tuple(a.shape[2:]))
    return found


def _without(part: LowRank) -> LowRank:
    out, inputs = part.shape
    return LowRank(part.a.new_zeros(0, inputs), part.b.new_zeros(out, 0), part.scale, part.kernel)


def _adapter(weights: Mapping[str, Tensor]) -> str:
    """PEFT's name of the adapter."""
    key = next(key for key in weights if ".lora_A." in key)
    return key.split(".lora_A.", 1)[1].removesuffix(".weight")


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    was = backbone.denoiser.training
    backbone.denoiser.eval()
    try:
        yield
    finally:
        backbone.denoiser.train(was)
