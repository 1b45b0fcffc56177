"""Token embeddings that are trained while tokenizers and text encoders stay as they are."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_safety.attacks.network import Network
from lit_safety.errors import UserError


class SoftTokens:
    """New tokens `<soft0>`, `<soft1>`, ... in every tokenizer and text encoder of a network.

    They start as the mean of all embeddings, each a little beside it. `tables` holds what is trained, one (K, d) a
    text encoder; `write` puts it into the text encoders.

    Args:
        network: gets the tokens.
        count: sets of them.
        vectors: tokens a set.
        seed: of where they start.
    """

    def __init__(self, network: Network, count: int, vectors: int, seed: int) -> None:
        words = [f"<soft{number}>" for number in range(count * vectors)]
        self.names = [words[start : start + vectors] for start in range(0, len(words), vectors)]
        self.tables: list[nn.Parameter] = []
        self.scales: list[float] = []
        """Standard deviation of each encoder's embeddings."""
        self._layers: list[tuple[Any, int]] = []
        for tokenizer, encoder in network.encoders():
            weight = encoder.get_input_embeddings().weight.detach()
            if tokenizer.add_tokens(words) != len(words):
                raise UserError(f"attack SoftPrompt: the tokenizer already knows {words[0]}")
            first = len(tokenizer) - len(words)
            centre, spread = weight.mean(0), weight.std(0)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(words), weight.shape[1], generator=generator).to(weight.device)
            self.tables.append(nn.Parameter((centre + 0.1 * spread * noise).float()))
            self.scales.append(float(spread.mean()))
            encoder.resize_token_embeddings(first + len(words), mean_resizing=False)
            encoder.requires_grad_(False)
            self._layers.append((encoder.get_input_embeddings(), first))
        self.write()

    def write(self) -> None:
        """The vectors as they are now become the text encoders' own."""
        with torch.no_grad():
            for (layer, first), table in zip(self._layers, self.tables, strict=True):
                layer.weight[first : first + len(table)] = table

    def trained(self) -> ExitStack:
        """Within, the text encoders read the tables, so that gradients reach them."""
        stack = ExitStack()
        for (layer, first), table in zip(self._layers, self.tables, strict=True):
            stack.callback(layer.register_forward_hook(_reading(first, table)).remove)
        return stack


def _reading(first: int, table: Tensor) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        ids = given[0]
        soft = ids >= first
        rows = table[(ids - first).clamp(min=0)].to(found.dtype)
        return torch.where(soft.unsqueeze(-1), rows, found)

    return hook
