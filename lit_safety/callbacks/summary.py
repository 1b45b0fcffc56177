"""A summary at the start (effective batch, learning rate, trained parameters, folder) and at the end (what was cut or
left out)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.data.protocols import Batched, LeavingOut, PairData, datamodule_of
from lit_safety.modules.preference import PreferenceModule

if TYPE_CHECKING:
    from lit_safety.data.cache.sources import CachedSource

T = TypeVar("T")


class RunSummary(Callback):
    """Prints the numbers that published trainers do not show."""

    def __init__(self) -> None:
        self._rate_told = False
        self._validated = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = datamodule_of(trainer)
        accumulation, ranks = trainer.accumulate_grad_batches, trainer.world_size
        # ZeRO 3 keeps a shard of each parameter and knows the size of the whole.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in pl_module.parameters() if p.requires_grad)
        if isinstance(data, Batched):
            print(f"batch   {data.batch_size} pairs x {accumulation} accumulated x {ranks} ranks = "
                  f"{data.batch_size * accumulation * ranks} pairs an optimizer step")  # fmt: skip
        for name in ("objective", "loss"):
            loss = vars(pl_module).get(name) or pl_module._modules.get(name)
            if loss is not None:
                print(f"loss    {call_of(loss)}")
        print(f"trained {trained:,} parameters in fp32")
        print(f"folder  {trainer.default_root_dir}")
        for one in cached_sources(trainer):
            if one.cache.text:
                print(
                    f"cache   {one.key}: latents and text by {one.cache}; no VAE and no text encoder is loaded for them"
                )
            else:
                print(f"cache   {one.key}: latents by {one.cache}; no VAE is loaded for them")
            if (reference := one.cache.reference) is not None:
                print(
                    f"cache   {one.key}: the reference's errors at {reference.draws} fixed draws a pair; it is not run"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._rate_told or not trainer.is_global_zero:
            return
        self._rate_told = True  # a checkpoint's rate is known only here
        rates = sorted({f"{group['lr']:.3g}" for one in trainer.optimizers for group in one.param_groups})
        print(f"rate    {', '.join(rates)} at the next step; not scaled by the batch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = self._validated or not trainer.sanity_checking

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = datamodule_of(trainer)
        if not self._validated and trainer.is_global_zero and trainer.num_val_batches and any(trainer.num_val_batches):
            print(
                f"note    there was no validation and no sample was drawn: trainer.val_check_interval is "
                f"{trainer.val_check_interval}, but the run had {trainer.fit_loop.total_batch_idx + 1} batches"
            )
        left_out = dict.fromkeys(data.bad_samples) if isinstance(data, LeavingOut) else {}
        truncated = pl_module.truncated.prompts if isinstance(pl_module, PreferenceModule) else {}
        mine = (left_out, truncated)
        everyone = on_all_ranks(mine)
        if not trainer.is_global_zero:
            return
        bad = {name: None for found, _ in everyone for name in found}
        cut = {name: text for _, found in everyone for name, text in found.items()}
        if bad:
            print(f"left out {len(bad)} bad samples; first: {next(iter(bad))}")
        from lit_safety.data.cache.cache import truncation, truncation_words

        if cut:
            print(f"text    {truncation_words(len(cut), next(iter(cut.values())))}")
        for one in cached_sources(trainer):
            if note := truncation(one.cache.to_dict()):
                print(f"text    {one.key}: {note}")


def call_of(made: object) -> str:
    """An object as the call that makes it, with all arguments that it stores under their own names, also defaults."""
    names = [name for name in inspect.signature(type(made)).parameters if name in vars(made)]
    return f"{type(made).__name__}({', '.join(f'{name}={getattr(made, name)!r}' for name in names)})"


def cached_sources(trainer: Trainer) -> list[CachedSource]:
    """The caches that a fit reads; empty for a user's own datamodule."""
    data = datamodule_of(trainer)
    return data.caches("fit") if isinstance(data, PairData) else []


def on_all_ranks(value: T) -> list[T]:
    """``value`` of every rank, rank 0's first. All ranks must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
