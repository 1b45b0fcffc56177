"""Experts that take turns in one adapter of the network.

The network holds a single adapter, and the optimizer knows only its parameters. They hold the expert whose turn it is.
The weights and optimizer states of the others are kept here, where the optimizer, ZeRO and all-reduce cannot reach
them. So an idle expert does not change by a bit, whatever the strategy does with parameters without a gradient. The
cost of a step and of the communication does not grow with the number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_safety.adapters.gathered import gathered, like, master_weights, whole
from lit_safety.adapters.lora import LoRA
from lit_safety.core.chance import sample_seed
from lit_safety.core.errors import UserError


@dataclass
class Resting:
    """An idle expert; tensors by the parameter's name."""

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The optimizer's state of each parameter; empty before its first step."""
    from_file: bool = False
    """Its state comes from a checkpoint and may be on another device."""


class ExpertBank:
    """The experts of one adapter. One of them at a time is in the network.

    A new expert's weights are a pure function of ``seed`` and its name; they do not depend on the other experts.

    Args:
        names: the experts; the first one is put into the network.
        parameters: the adapter's parameters by name.
        lora: how a new expert is initialised.
        seed: the same on every rank.
    """

    def __init__(self, names: Sequence[str], parameters: Mapping[str, nn.Parameter], lora: LoRA, seed: int = 0) -> None:
        self.names = list(names)
        self.parameters = dict(parameters)
        self.lora = lora
        self.seed = seed
        self.batches = dict.fromkeys(self.names, 0)
        """How many (micro-)batches each expert was trained on, on each rank."""
        self._shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}
        self._resting: dict[str, Resting] = {}
        self._begin: dict[str, dict[str, Tensor]] = {}
        self.active = self.names[0]
        """The expert whose weights are in the network."""
        self._write(self._fresh(self.active))

    def activate(self, name: str, optimizer: Optimizer | None = None) -> None:
        """Give the turn to ``name``: its weights go into the network, its state into ``optimizer``.

        Args:
            name: the expert; if it is its turn already, nothing changes.
            optimizer: of the adapter's parameters; None: its state is not kept.
        """
        if name == self.active:
            return
        resting = self._resting.pop(name, None) or Resting(self._fresh(name))
        self._resting[self.active] = Resting(master_weights(self.parameters), self._take_state(optimizer))
        self._write(resting.weights)
        if optimizer is not None:
            self._give_state(optimizer, resting)
        self.active = name

    @contextmanager
    def shown(self, name: str) -> Iterator[None]:
        """Inside, the network computes with expert ``name``: to evaluate, draw or export, not to train."""
        if name == self.active:
            yield
            return
        kept = self.read()
        self._write(self.weights(name))
        try:
            yield
        finally:
            self._write(kept)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Expert ``name`` in fp32; on all ranks."""
        if name == self.active:
            return master_weights(self.parameters)
        return self._resting[name].weights if name in self._resting else self._fresh(name)

    def read(self) -> dict[str, Tensor]:
        """A copy of the weights that are in the network."""
        with gathered(self.parameters.values()):
            return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        with gathered(self.parameters.values(), write=True), torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like(weights[name], parameter))

    def begin_with(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let every expert start from these weights instead of new ones. Call it before training."""
        self._begin = {name: dict(one) for name, one in weights.items()}
        self._write(self._fresh(self.active))

    def put(self, weights: Mapping[str, Mapping[str, Tensor]], optimizer: Optimizer | None = None) -> None:
        """Give every expert these weights and no optimizer state, between two steps; a checkpoint holds them.

        Args:
            weights: of each expert by the parameter's name.
            optimizer: of the adapter's parameters.
        """
        self._take_state(optimizer)
        self._resting = {name: Resting(dict(weights[name])) for name in self.names if name != self.active}
        self._write(weights[self.active])

    def fresh(self, name: str) -> dict[str, Tensor]:
        """What expert ``name`` began or would begin with."""
        return self._fresh(name)

    def _fresh(self, name: str) -> dict[str, Tensor]:
        if name in self._begin:
            return self._begin[name]
        return self.lora.draw(self._shapes, sample_seed(self.seed, 0, f"expert {name}"))

    def _take_state(self, optimizer: Optimizer | None) -> dict[str, dict[str, Any]]:
        if optimizer is None:
            return {}
        states = {name: optimizer.state.pop(p, None) for name, p in self.parameters.items()}
        return {name: state for name, state in states.items() if state}

    def _give_state(self, optimizer: Optimizer, resting: Resting) -> None:
        for name, state in resting.optimizer.items():
            parameter = self.parameters[name]
            optimizer.state[parameter] = {
                key: like(value, parameter) if isinstance(value, Tensor) else value for key, value in state.items()
            }
        if resting.from_file:
            optimizer.load_state_dict(optimizer.state_dict())  # torch then moves each state to the right device

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint of the network and the optimizer does not hold. All ranks must call it."""
        return {
            "active": self.active,
            "names": list(self.names),
            "batches": dict(self.batches),
            "seed": self.seed,
            "resting": {
                name: {
                    "weights": dict(one.weights),
                    "optimizer": {key: _whole_state(state) for key, state in one.optimizer.items()},
                }
                for name, one in sorted(self._resting.items())
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``. The network's and the optimizer's own states are in the checkpoint's other parts.

        Raises:
            UserError: the checkpoint holds other experts.
        """
        if set(state["names"]) != set(self.names):
            raise UserError(
                f"the checkpoint holds the experts {', '.join(state['names'])}, but this run has "
                f"{', '.join(self.names)}: resume with the config.yaml of that run; to combine experts of different "
                "runs use `merge`"
            )
        for name, one in state["resting"].items():
            if {k: v.shape for k, v in one["weights"].items()} != self._shapes:
                raise UserError(
                    f"the checkpoint's expert {name} has another rank or other target_modules than this run"
                )
        self.active, self.seed, self.batches = state["active"], state["seed"], dict(state["batches"])
        self._resting = {
            name: Resting(one["weights"], one["optimizer"], from_file=True) for name, one in state["resting"].items()
        }


def _whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
