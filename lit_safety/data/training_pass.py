"""A pass over the training pairs, before it begins: whether it has a step, and what it takes of them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info

from lit_safety.data.mix import mixed_batches, shares
from lit_safety.data.order import Deal
from lit_safety.data.plan import Group, batches_in
from lit_safety.data.settings_check import KEY
from lit_safety.errors import UserError


def check_pass(groups: Sequence[Group], deal: Deal, pairs: int, weights: Sequence[float] | None) -> None:
    """Whether a pass has a step.

    Args:
        groups: the pairs that are batched with each other; none where no category has pairs enough for a step.
        deal: how they are dealt to steps.
        pairs: how many take part, those in no group included.
        weights: in which proportion each batch is made of all groups; None: a batch is made of one.

    Raises:
        UserError: the pairs are too few.
    """
    batches = batches_in(groups, deal) if weights is None else mixed_batches(groups, deal)
    if batches:
        return
    held = (
        f"{pairs} pairs, fewer than one step takes"
        if groups
        else f"no category with as many pairs as one step takes, of {pairs}"
    )
    raise UserError(
        f"{KEY}.train has {held}: {deal.batch_size} ({KEY}.batch_size) x {deal.world} (ranks) x "
        f"{deal.accumulate} (trainer.accumulate_grad_batches)"
    )


def say_pass(groups: Sequence[Group], deal: Deal, pairs: int, weights: Sequence[float] | None) -> None:
    """Log what a pass takes and leaves out. Arguments are those of `check_pass`.

    Raises:
        UserError: a weight is too small for its group to be seen in a pass.
    """
    if weights is not None:
        _say_mix(groups, deal, weights)
    elif dropped := sum(deal.dropped(group.selection.total) for group in groups):
        rank_zero_info(f"a pass leaves out {dropped} of {pairs} training pairs, others each time")
    if shapes := ", ".join(f"{group.name} ({group.selection.total})" for group in groups if group.size is not None):
        rank_zero_info(f"pairs by shape: {shapes}")


def _say_mix(groups: Sequence[Group], deal: Deal, weights: Sequence[float]) -> None:
    each = shares(weights, mixed_batches(groups, deal) * deal.batch_size * deal.world)
    for number, (share, group, weight) in enumerate(zip(each, groups, weights, strict=True)):
        if not share:
            raise UserError(f"{KEY}.weights[{number}] is {weight}: not one pair in a pass of {sum(each)}; raise it")
        rank_zero_info(f"a pass takes {share} pairs of the {group.selection.total} of {KEY}.train[{number}]")
