"""One expert after the other, each with a fresh optimizer and schedule: what DeepSpeed needs, and what any may do.

ZeRO flattens what it trains into partitions of its own when its engine is made, and hands zeros to what got no
gradient. So an expert's turn under DeepSpeed is an engine of its own: at the end of a phase the fp32 weights are
gathered, the engine is taken down, the next expert's weights are put in, and a new engine is made around them.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_safety.adapters.expert_bank import ExpertBank


def under_deepspeed(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def begin_phase(trainer: Trainer, module: LightningModule, bank: ExpertBank, name: str) -> None:
    """End the phase of the expert that is in the network and begin that of ``name``: on all ranks, between steps."""
    strategy: Any = trainer.strategy
    if not under_deepspeed(trainer):
        bank.activate(name)
        strategy.setup_optimizers(trainer)
        return
    # Before the engine is taken down: the weights that rest are its optimizer's, in fp32.
    bank.activate(name)
    strategy.deepspeed_engine.destroy()
    strategy.model = module
    strategy.init_deepspeed()
