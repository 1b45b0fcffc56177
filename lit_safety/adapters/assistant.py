"""An assistant adapter: a frozen LoRA that undoes the distillation of a few-step student while a LoRA is trained.

Training by flow matching teaches a student what its base was, not what its distillation made of it, so that it no
longer draws in a few steps. With a LoRA beside it that has already undone the distillation, the trained LoRA has
nothing of this to learn. It is then used with the student alone.

The update is added to what each layer computes, in a hook, so that weights of any format stay as they are, and PEFT
knows of one adapter only, the one that is trained: `reference` switches that off, and files hold no other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_safety.adapters.layer_names import adaptable_layers
from lit_safety.adapters.lora_file import Convert, find_lora, read_lora
from lit_safety.adapters.low_rank import LowRank, squared_norm
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import file_sha256


class Assistant:
    """Adds a LoRA file to a network, in some of its passes.

    It is on in the passes of the functions given to `within`, and off in all others, such as a stock pipeline's. A
    backward pass that computes activations again does so as the last forward pass did.

    Args:
        path: the LoRA's folder or file.
        network: gets hooks; before another adapter is attached to it.
        component: its name in the pipeline, such as transformer.
        convert: of the family's file names.
        key: where the path was given, for messages.

    Raises:
        UserError: the file is missing, damaged, no plain LoRA, made for another network, or without any effect.
    """

    def __init__(self, path: str, network: nn.Module, component: str, convert: Convert, key: str) -> None:
        try:
            known = {component: adaptable_layers(network, component)}
            layers = read_lora(path, known, convert)
            self.sha256 = file_sha256(find_lora(path)[0])
        except UserError as error:
            raise UserError(f"`{key}` {error}") from error
        if not sum(squared_norm(update) for update in layers.values()) > 0:
            raise UserError(f"`{key}` {path}: its update is 0 everywhere, so that it undoes nothing; is it the file?")
        self.path = path
        self._inside = self._on = False
        network.register_forward_pre_hook(self._begin)
        for name, update in layers.items():
            layer = known[component][name.removeprefix(f"{component}.")]
            if layer.kernel:
                raise UserError(f"`{key}` {path}: {name} is a convolution, and only linear layers are assisted")
            network.get_submodule(layer.name).register_forward_hook(_Update(self, update))

    @property
    def on(self) -> bool:
        """Whether the update is part of the pass that has begun last."""
        return self._on

    def _begin(self, network: nn.Module, arguments: Any) -> None:
        self._on = self._inside

    def within(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, with the update in every pass that it makes of the network."""

        @wraps(function)
        def assisted(*arguments: Any, **named: Any) -> Tensor:
            before, self._inside = self._inside, True
            try:
                return function(*arguments, **named)
            finally:
                self._inside = before

        return assisted


class _Update:
    """A layer's forward hook: its output plus scale B A x.

    Args:
        assistant: says whether.
        update: of the layer.
    """

    def __init__(self, assistant: Assistant, update: LowRank) -> None:
        self.assistant = assistant
        self.a = update.a.float()
        self.b = update.b.float() * update.scale

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.assistant.on:
            return None
        x: Tensor = arguments[0]
        if self.a.device != x.device:
            with torch.inference_mode(False):  # it serves passes with gradient later
                self.a, self.b = self.a.to(x.device), self.b.to(x.device)
        update = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)
        return output + update.to(output.dtype)
