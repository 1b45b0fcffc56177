"""An expert: one category's LoRA as low-rank factors by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_safety.adapters.lora_file import LowRank
from lit_safety.errors import UserError


@dataclass(frozen=True)
class Expert:
    """A LoRA to merge.

    Experts are always put in the order of their names, so that a merge never depends on the order of the arguments.
    """

    name: str
    layers: Mapping[str, LowRank]
    """By `{component}.{layer}`, such as `unet.mid_block.attentions.0...to_q`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from, for the report."""


def united_layers(experts: Sequence[Expert]) -> list[str]:
    """The names of all layers that any expert adapts, sorted, after a check that they fit each other.

    Raises:
        UserError: two experts were made for different backbones: they adapt different parts of a pipeline, or a layer
            of the same name has different sizes.
    """
    denoisers = {e.name: {n.split(".", 1)[0] for n in e.layers if not n.startswith("text_encoder")} for e in experts}
    if len(set().union(*denoisers.values())) > 1:
        told = "; ".join(f"{name}: {', '.join(sorted(parts)) or 'none'}" for name, parts in denoisers.items())
        raise UserError(f"the experts were made for different backbones, their denoisers are called {told}")
    first: dict[str, Expert] = {}
    for expert in experts:
        for name, layer in expert.layers.items():
            other = first.setdefault(name, expert)
            known = other.layers[name]
            if (known.shape, known.kernel) != (layer.shape, layer.kernel):
                raise UserError(
                    f"the experts {other.name} and {expert.name} were made for different backbones: {name} is "
                    f"{_size(known)} in one and {_size(layer)} in the other; merge experts of one base model"
                )
    return sorted(first)


def _size(layer: LowRank) -> str:
    kernel = f" with a {' x '.join(map(str, layer.kernel))} kernel" if layer.kernel else ""
    return f"{layer.shape[1]} -> {layer.shape[0]}{kernel}"


def parts_of(experts: Sequence[Expert], layer: str) -> list[LowRank]:
    """Every expert's update of one layer; where an expert does not adapt it, the zero update of rank 0."""
    known = next(expert.layers[layer] for expert in experts if layer in expert.layers)
    out, inputs = known.shape
    zero = LowRank(known.a.new_zeros(0, inputs), known.b.new_zeros(out, 0), kernel=known.kernel)
    return [expert.layers.get(layer, zero) for expert in experts]
