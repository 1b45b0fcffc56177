"""How a step is computed, to save time or memory; the result of the training stays the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lit_safety.core.chance import uniform
from lit_safety.core.errors import UserError
from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors

if TYPE_CHECKING:
    from lit_safety.data.reading.batch import PairBatch


@dataclass
class Speed:
    """Options of a step.

    Args:
        compile: backend of torch.compile for the denoiser's repeated blocks, such as inductor; null: not compiled.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: less memory, but
            a slower step.
        selective: train on all pairs with a large gradient and on a random part of the others; null: on all pairs.
        margin_limit: the largest margin |m| in logits that is accepted before the first update with a cached or
            compiled reference.
    """

    compile: str | None = None
    gradient_checkpointing: bool = False
    selective: SelectiveBackward | None = None
    margin_limit: float = 0.05

    def apply(self, denoiser: nn.Module) -> None:
        """Prepare the denoiser, after its adapters were attached.

        Raises:
            UserError: torch knows no such backend, or the denoiser does not name its repeated blocks.
        """
        network: Any = denoiser
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.compile is None:
            return
        import torch._dynamo

        if self.compile not in (known := torch._dynamo.list_backends(exclude_tags=())):
            raise UserError(f"`model.init_args.speed.compile: {self.compile}` must be one of {', '.join(known)}")
        # Adapters on or off, training or not: each combination needs some graphs, and blocks of the same kind share
        # them.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        # As diffusers' `compile_repeated_blocks`; some transformers, such as SD3's, name their blocks only as what no
        # strategy may split.
        names = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        if not blocks:
            raise UserError(
                f"`model.init_args.speed.compile`: {type(denoiser).__name__} does not name its repeated blocks; leave "
                "it null"
            )
        for block in blocks:
            block.compile(backend=self.compile)


# Selective backward: pairs with a small gradient are trained only at random, and then count more.
#
# A forward pass without gradient computes each pair's gradient weight w. Pairs with w below a threshold stay in with
# probability q = max(least, w / threshold), the others with q = 1. The pairs that stay in get a forward and a backward
# pass, and their loss is multiplied by 1 / q. The expected gradient is that of the whole batch: E[1{u < q} / q] = 1 for
# each pair. It saves time if less than B / (F + B) of the pairs stay in (F, B: time of a forward and a backward pass;
# about half for a LoRA). The host reads the weights for the draw, so a step waits for the device once.


#: The errors for which a loss has a gradient.
_LEAVES = ("policy_chosen", "policy_rejected", "drift")


class Steps(Protocol):
    """What `SelectiveBackward` needs from the module; `PreferenceModule` provides it."""

    objective: Objective

    @property
    def device(self) -> torch.device: ...

    def errors(self, batch: PairBatch) -> PairErrors: ...

    def loss(self, errors: PairErrors, batch: PairBatch) -> ObjectiveOutput: ...

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]: ...


class SelectiveBackward:
    """Chooses the pairs of a batch that are trained on.

    Args:
        threshold: gradient weight from which a pair always stays in, as `gradient_weights` counts it.
        least: the smallest probability that a pair stays in; a pair's loss is multiplied by at most 1 / least.

    Raises:
        ValueError: if ``threshold`` is not positive or ``least`` not in (0, 1].
    """

    def __init__(self, threshold: float = 0.25, least: float = 0.1) -> None:
        if threshold <= 0 or not 0 < least <= 1:
            raise ValueError(f"threshold must be above 0 and least in (0, 1], got {threshold} and {least}")
        self.threshold = threshold
        self.least = least

    def probabilities(self, weights: Tensor) -> Tensor:
        """Gradient weights (B,) -> the probability with which each pair stays in (B,)."""
        return (weights / self.threshold).clamp(self.least, 1.0)

    def step(self, module: Steps, batch: PairBatch) -> tuple[Tensor, ObjectiveOutput, PairErrors]:
        """The loss () for the backward pass, and losses, logs and errors of the whole batch without gradient.

        Args:
            module: the training module.
            batch: the batch as the module's `ordered` returns it.
        """
        with torch.no_grad():
            errors = module.errors(batch)
        output, weights = gradient_weights(module, errors, batch)
        chances = self.probabilities(weights).tolist()
        kept = [row for row, q in enumerate(chances) if uniform(batch.seeds[row], "backward") < q]
        output.logs["backward/kept"] = torch.tensor([len(kept) / len(batch)])
        if not kept:  # every rank must run a backward pass; the optimizer then steps with a gradient of 0
            nothing = torch.stack([p.sum() * 0.0 for _, p in module.trainable_parameters()]).sum()
            return nothing, output, errors
        part = batch.take(kept)
        if not module.objective.needs_drift:  # else the reference's predictions are needed, so it must run again
            stored = torch.stack([errors.reference_chosen, errors.reference_rejected], dim=1)[kept]
            part = replace(part, reference=stored.unsqueeze(2).expand(-1, -1, 2))
        counts = torch.tensor([1.0 / chances[row] for row in kept]).to(module.device, non_blocking=True)
        loss = (module.loss(module.errors(part), part).loss * counts).sum() / len(batch)
        return loss, output, errors


def gradient_weights(module: Steps, errors: PairErrors, batch: PairBatch) -> tuple[ObjectiveOutput, Tensor]:
    """How large each pair's gradient is at the network's output: (B,), 1 - p for Diffusion-DPO.

    An error e is a mean of squares, so a slope c = dL/de gives a gradient of norm 2 |c| sqrt(e / N) there, where N is
    the size of a prediction. The weight is sqrt(sum of c^2 e) over the loss's errors, relative to what a slope of beta
    / 2 on the errors of chosen and rejected would give.

    Returns: the objective's output, without gradient, and the weights.
    """
    leaves = {name: value.detach().requires_grad_() for name in _LEAVES if (value := getattr(errors, name)) is not None}
    with torch.enable_grad():
        output = module.loss(replace(errors, **leaves), batch)
        slopes = torch.autograd.grad(output.loss.sum(), list(leaves.values()), allow_unused=True)
    squares = [
        slope.square() * leaf.detach() for slope, leaf in zip(slopes, leaves.values(), strict=True) if slope is not None
    ]
    unit = (0.5 * module.objective.beta) ** 2 * (errors.policy_chosen + errors.policy_rejected)
    weights = (torch.stack(squares).sum(0) / unit.clamp(min=1e-30)).sqrt()
    return ObjectiveOutput(output.loss.detach(), output.logs), weights
