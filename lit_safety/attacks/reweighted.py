"""Re-weighted conditioning: words of the prompt, or layers of the text encoder, count more or less than normal."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_safety.attacks.network import Network
from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt


@dataclass(frozen=True)
class Weighting:
    """One way of weighting the text.

    Raises:
        UserError: a weight is not a finite number, or both are 1.
    """

    tokens: float = 1.0
    """Factor on the text encoder's outputs for tokens of the prompt."""
    of: Literal["prompt", "concept"] = "prompt"
    """Which tokens: all of the prompt, or those of its concept if the prompt names it (else all)."""
    layers: float = 1.0
    """Factor on what layers of the text encoder add to the residual stream."""
    layer: int | None = None
    """Which layer, counted from 0, or backwards from -1; null: all layers."""

    def __post_init__(self) -> None:
        if not (isfinite(self.tokens) and isfinite(self.layers)) or self.tokens == self.layers == 1:
            raise UserError(
                f"Reweighted: tokens {self.tokens}, layers {self.layers}: must be finite numbers, and one of them not 1"
            )

    def label(self) -> str:
        """Such as `concept x 2` or `layer -1 x 0.5`."""
        parts = [f"{self.of} x {self.tokens:g}"] if self.tokens != 1 else []
        where = "all layers" if self.layer is None else f"layer {self.layer}"
        return ", ".join(parts + ([f"{where} x {self.layers:g}"] if self.layers != 1 else []))


WEIGHTINGS = (
    *(Weighting(tokens=weight, of=of) for of in ("concept", "prompt") for weight in (1.5, 2.0, 3.0)),
    *(Weighting(layers=weight) for weight in (0.7, 1.3)),
    *(Weighting(layers=weight, layer=layer) for layer in (0, -1) for weight in (0.0, 2.0)),
)
"""The default weightings."""


class Reweighted(Attack):
    """Draw the same prompts and seeds with different weightings of the text; it succeeds if any of them does.

    Only rows with an attacked prompt are weighted. The empty prompt and the arm's negative prompt do not change.

    Args:
        weightings: the weightings, in the order in which they are tried; null: `WEIGHTINGS`.
    """

    budget: ClassVar[str] = "weightings tried"
    knows = "white box as to the text encoder, black box as to the denoiser: scales tokens and layers, computes nothing"
    cumulative: ClassVar[bool] = True

    def __init__(self, weightings: list[Weighting] | None = None) -> None:
        self.weightings = [*WEIGHTINGS] if weightings is None else list(weightings)
        if not self.weightings:
            raise UserError("Reweighted: weightings is empty; give at least one")
        self.settings = {"weightings": [asdict(one) for one in self.weightings]}

    @property
    def points(self) -> int:
        return len(self.weightings)

    def refuses(self, target: Target) -> str | None:
        if (reason := target.closed()) is not None:
            return reason
        for one in self.weightings:
            if one.layer is None or one.layers == 1:
                continue
            for name, encoder in target.pipe.components.items():
                if not name.startswith("text_encoder") or encoder is None:
                    continue
                if not -len(_layers(encoder)) <= one.layer < len(_layers(encoder)):
                    return f"its {name} has {len(_layers(encoder))} layers and no layer {one.layer}"
        return None

    def stages(self, target: Target) -> Iterator[Stage]:
        network = target.network()
        for number, one in enumerate(self.weightings, 1):
            weighed = Weighed(one, target.prompts)
            yield target.stage(
                number, pipe=weighed.put(network), drawing=target.exact, label=one.label(),
                identity={"weighting": asdict(one)}, apply=weighed.put,
            )  # fmt: skip


@dataclass
class Weighed:
    """A weighting of some prompts, which can be applied to a network's text encoders."""

    weighting: Weighting
    prompts: Sequence[Prompt]
    _at: threading.local = field(default_factory=threading.local)
    """Which rows of the batch are weighted. It is kept for each thread, because batches are drawn at the same time."""

    def put(self, network: Network) -> Any:
        """Weight the text of the network's pipeline, replacing any earlier weighting; returns the pipeline."""
        for tokenizer, encoder in network.encoders():
            for handle in vars(encoder).pop("_weighed", []):
                handle.remove()
            weigher = _Weigher(self, _Texts(tokenizer, self.prompts, self.weighting.of))
            handles: list[Any] = [encoder.register_forward_pre_hook(weigher.before, with_kwargs=True)]
            layers = _layers(encoder)
            chosen = layers if self.weighting.layer is None else [layers[self.weighting.layer]]
            if self.weighting.layers != 1:
                handles += [_Around(layer, weigher.layer) for layer in chosen]
            if self.weighting.tokens != 1:
                handles.append(encoder.register_forward_hook(weigher.after, with_kwargs=True))
            vars(encoder)["_weighed"] = handles
        return network.pipe


class _Texts:
    """Finds attacked prompts among an encoder's input tokens, independent of a template around them."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Prompt], of: str) -> None:
        self.found: dict[tuple[int, ...], list[bool]] = {}
        for prompt in prompts:
            for text in (prompt.prompt, f" {prompt.prompt}", prompt.prompt.lower().strip()):
                ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
                if ids:
                    self.found.setdefault(ids, _named(tokenizer, ids, prompt.concept if of == "concept" else ""))
        self.longest = sorted(self.found, key=len, reverse=True)
        self.special = set(tokenizer.all_special_ids)

    def weights(self, ids: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) -> factors (B, L), and whether a row holds an attacked prompt (B,)."""
        factors, rows = torch.ones(ids.shape), torch.zeros(len(ids), dtype=torch.bool)
        for number, row in enumerate(ids.tolist()):
            for text in self.longest:
                start = _text_start(row, text, self.special)
                if start is not None:
                    rows[number] = True
                    for offset, named in enumerate(self.found[text][: len(row) - start]):
                        if named and row[start + offset] == text[offset]:
                            factors[number, start + offset] = weight
                    break
        return factors, rows


def _named(tokenizer: Any, ids: tuple[int, ...], concept: str) -> list[bool]:
    """Which tokens are the concept's; all tokens if the concept is not named."""
    for text in (concept, f" {concept}") if concept else ():
        word = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        start = _text_start(list(ids), word, set()) if word else None
        if start is not None:
            return [start <= place < start + len(word) for place in range(len(ids))]
    return [True] * len(ids)


def _text_start(row: list[int], text: tuple[int, ...], special: set[int]) -> int | None:
    """The position where a text begins in a row's tokens; a truncated row may hold only the text's beginning."""
    for start in range(len(row)):
        if row[start] != text[0]:
            continue
        part = row[start : start + len(text)]
        if tuple(part) == text:
            return start
        # truncated: the rest of the row, without the end token
        body = part[:-1] if part and part[-1] in special else part
        if len(body) > 1 and start + len(part) == len(row) and tuple(body) == text[: len(body)]:
            return start
    return None


class _Around:
    """Changes the output of a layer's `forward`. A hook would be too late: transformers stores hidden states before."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        self.layer, self.before = layer, vars(layer).get("forward")
        forward = layer.forward

        def changed(*args: Any, **kwargs: Any) -> Any:
            return change(args, kwargs, forward(*args, **kwargs))

        vars(layer)["forward"] = changed

    def remove(self) -> None:
        """Restore the layer."""
        del vars(self.layer)["forward"]
        if self.before is not None:
            vars(self.layer)["forward"] = self.before


class _Weigher:
    """The hooks of one text encoder."""

    def __init__(self, weighed: Weighed, texts: _Texts) -> None:
        self.weighting, self.texts, self.at = weighed.weighting, texts, weighed._at

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _ids(args, kwargs)
        self.at.now = None if ids is None else self.texts.weights(ids, self.weighting.tokens)

    def layer(self, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> Any:
        now = getattr(self.at, "now", None)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if now is None or not isinstance(hidden, Tensor):
            return found
        after = found[0] if isinstance(found, tuple) else found
        rows = now[1].to(after.device).view(-1, 1, 1)
        changed = torch.where(rows, hidden + self.weighting.layers * (after - hidden), after)
        return (changed, *found[1:]) if isinstance(found, tuple) else changed

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> Any:
        ids, now = _ids(args, kwargs), getattr(self.at, "now", None)
        if ids is None or now is None:
            return found

        def weighed(one: Any) -> Any:
            if isinstance(one, Tensor) and one.ndim == 3 and one.shape[:2] == ids.shape:
                return one * now[0].to(one).unsqueeze(-1)
            return tuple(map(weighed, one)) if isinstance(one, tuple) else one

        if isinstance(found, tuple):
            return weighed(found)
        for name in ("last_hidden_state", "hidden_states"):
            if getattr(found, name, None) is not None:
                setattr(found, name, weighed(getattr(found, name)))
        return found


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _layers(encoder: Any) -> list[nn.Module]:
    """The layers of a text encoder: its longest list of modules."""
    lists = [module for name, module in encoder.named_modules()
             if isinstance(module, nn.ModuleList) and "vision" not in name and "visual" not in name]  # fmt: skip
    longest = max(lists, key=len, default=None)
    return [] if longest is None else list(longest)
