"""The adversaries: they disturb the text encoder's output or its input, or hidden states of the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_safety.core.chance import uniform
from lit_safety.core.errors import UserError
from lit_safety.modules.adversary import KEY, SignSteps, named
from lit_safety.modules.attacked_prediction import Moved, index

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone, Conditioning

#: The text encoders' outputs, by the families' names. Masks, sizes and users' tokens are not disturbed.
TEXT = ("encoder_hidden_states", "pooled_projections", "text_embeds")


def unit(values: Tensor) -> Tensor:
    """The standard deviation of each row (N, ...), as (N, 1, ...), without gradient."""
    return values.detach().float().flatten(1).std(1).view(-1, *[1] * (values.ndim - 1))


def added(values: Tensor, disturbance: Tensor) -> Tensor:
    """Values (N, ...) or (2N, ...) plus a disturbance (N, ...) that is given in standard deviations of the values."""
    twice = disturbance.repeat(len(values) // len(disturbance), *[1] * (disturbance.ndim - 1))
    return (values.float() + twice * unit(values)).to(values.dtype)


class TextAdversary(SignSteps):
    """Disturbs the text encoder's output, or puts a few soft tokens in front of the prompt that it reads.

    Args:
        tokens: soft tokens in front of the prompt, as an attacker learns them; they begin at the mean of the encoder's
            embeddings, and are measured in the embeddings' standard deviation. 0: the encoder's output is disturbed.
            This is the only choice for text from a cache.
        replay: how many of the found disturbances are remembered; a search can then start from one that was found for a
            pair of the same category. 0: every search starts from scratch.
        replay_share: probability that a search starts from a remembered disturbance.
        radius: bound of every number of a disturbance, in standard deviations.
        steps: sign steps; each costs a forward and a backward pass of the attacked pairs' rejected images.
        step: length of one.
        share: probability with which a harmful pair is attacked.
        noise: standard deviation of the noise on pairs with a clean prompt, in units of the radius; 0: none.
        clean_share: probability with which such a pair gets noise.
        start: standard deviation of the noise that a search starts from; 0: it starts from nothing.
        restarts: searches, each from a start of its own; the one with the lowest error at its end counts.
        grow: optimizer steps over which radius and step grow from 0 to what is set; 0: they have it at once.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self,
        tokens: int = 0,
        replay: int = 0,
        replay_share: float = 0.5,
        radius: float = 1.0,
        steps: int = 2,
        step: float = 0.6,
        share: float = 0.5,
        noise: float = 0.5,
        clean_share: float = 1.0,
        start: float = 0.0,
        restarts: int = 1,
        grow: int = 0,
    ) -> None:
        super().__init__(radius, steps, step, share, noise, clean_share, start, restarts, grow)
        if tokens < 0 or replay < 0 or not 0 <= replay_share <= 1:
            raise ValueError(
                f"tokens and replay must not be negative and replay_share lie in [0, 1], got {tokens}, {replay} and "
                f"{replay_share}"
            )
        self.tokens, self.replay, self.replay_share = tokens, replay, replay_share
        self._memory = Memory(replay)

    def check(self, backbone: Backbone, cached_text: Sequence[str], compiled: bool = False) -> None:
        if not self.tokens:
            return
        if cached_text:
            raise UserError(
                f"`{KEY}`: soft tokens need the text encoder, but the text of {cached_text[0]} comes from a cache: set "
                "tokens to 0, or `data.init_args.use_cache` to false"
            )
        for _, _, encoder, _ in _encoders(backbone):
            kind = encoder.config.model_type
            if kind not in _PLACES:
                raise UserError(
                    f"`{KEY}`: soft tokens work with {' and '.join(_PLACES)}, but the text encoder of "
                    f"{type(backbone).__name__} is a {kind}: set tokens to 0"
                )

    @contextmanager
    def on(
        self, moved: Moved, backbone: Backbone, prompts: Sequence[str], conditioning: Conditioning, rows: Sequence[int]
    ) -> Iterator[Conditioning]:
        touched = moved.touched(rows)
        found = {name: values for name, values in conditioning.items() if name in TEXT}
        if self.tokens:
            moved.shapes = {name: (self.tokens, layer.weight.shape[1]) for name, _, _, layer in _encoders(backbone)}
        else:
            moved.shapes = {name: tuple(values.shape[1:]) for name, values in found.items()}
        if not touched:
            yield conditioning
            return
        if self.tokens:
            yield self._in_front(moved, backbone, prompts, conditioning, rows, touched)
            return
        yield conditioning | {
            name: added(values, moved.disturbance(name, moved.shapes[name], rows)) for name, values in found.items()
        }

    def _in_front(
        self,
        moved: Moved,
        backbone: Backbone,
        prompts: Sequence[str],
        conditioning: Conditioning,
        rows: Sequence[int],
        touched: Sequence[int],
    ) -> Conditioning:
        places = [rows.index(row) for row in touched]
        texts = [prompts[place] for place in places]
        odd = len(texts) % 2  # encoders take an even number of rows, as in `encode_alike`
        with ExitStack() as stack, torch.set_grad_enabled(moved.searching and torch.is_grad_enabled()):
            for name, start, encoder, layer in _encoders(backbone):
                units = moved.disturbance(name, moved.shapes[name], rows).index_select(0, index(places, moved.device))
                centre, spread = _statistics(layer)
                vectors = centre + spread * units
                stack.enter_context(_soft_tokens(encoder, layer, torch.cat([vectors, vectors[:odd]]), start))
            encoded = backbone.encode_text([*texts, *[""] * odd])
        result = dict(conditioning)
        for name, values in encoded.items():
            if name not in conditioning:
                continue
            new = values[: len(texts)].float()
            times = len(conditioning[name]) // len(rows)
            at = [place + turn * len(rows) for turn in range(times) for place in places]
            new = torch.cat([new] * times)
            result[name] = conditioning[name].index_copy(0, index(at, moved.device), new.to(conditioning[name].dtype))
        return result

    # ---- memory of found disturbances

    def replayed(self, moved: Moved, name: str, start: Tensor) -> Tensor:
        """``start`` (attacked pairs, *shape), with some rows replaced by remembered disturbances of their category."""
        seeds = moved.seeds(moved.attacked)
        again = [uniform(seed, f"{moved.purpose}-replay") < self.replay_share for seed in seeds]
        which = [uniform(seed, f"{moved.purpose}-which") for seed in seeds]
        return self._memory.picked(name, start, moved.categories(), again, which)

    def remember(self, moved: Moved) -> None:
        if self.replay:
            self._memory.keep(moved)

    def turn(self, gather: Callable[[Tensor], Tensor]) -> None:
        if self.replay:
            self._memory.turn(gather)

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict() if self.replay else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if bool(self.replay) != ("category" in state):
            raise ValueError(
                f"TextAdversary has replay {self.replay}, but the checkpoint was written with another value"
            )
        if self.replay:
            self._memory.load_state_dict(state)


class HiddenAdversary(SignSteps):
    """Disturbs hidden states of the denoiser: the outputs of chosen layers.

    Args:
        layers: endings of the layers' names, such as `attn2` for the outputs of a UNet's cross-attention. If a layer
            returns several tensors, the first is disturbed.
        radius: bound of every number of a disturbance, in standard deviations of the layer's output.
        steps: sign steps; each costs a forward and a backward pass of the attacked pairs' rejected images.
        step: length of one.
        share: probability with which a harmful pair is attacked.
        noise: standard deviation of the noise on pairs with a clean prompt, in units of the radius; 0: none.
        clean_share: probability with which such a pair gets noise.
        start: standard deviation of the noise that a search starts from; 0: it starts from nothing.
        restarts: searches, each from a start of its own; the one with the lowest error at its end counts.
        grow: optimizer steps over which radius and step grow from 0 to what is set; 0: they have it at once.

    Raises:
        ValueError: ``layers`` is empty, or a number is outside its range.
    """

    def __init__(
        self,
        layers: list[str],
        radius: float = 0.3,
        steps: int = 2,
        step: float = 0.2,
        share: float = 0.5,
        noise: float = 0.5,
        clean_share: float = 1.0,
        start: float = 0.0,
        restarts: int = 1,
        grow: int = 0,
    ) -> None:
        super().__init__(radius, steps, step, share, noise, clean_share, start, restarts, grow)
        if not layers:
            raise ValueError("layers is empty: name endings of layers' names, such as attn2")
        self.layers = layers
        self._found: list[tuple[str, nn.Module]] = []

    def check(self, backbone: Backbone, cached_text: Sequence[str], compiled: bool = False) -> None:
        if compiled:
            raise UserError(
                f"`{KEY}`: compiled blocks do not see what is added to hidden states: set "
                "`model.init_args.speed.compile` to null, or use TextAdversary"
            )
        found = named(backbone.denoiser, self.layers)
        for ending, layers in found.items():
            if not layers:
                raise UserError(
                    f"`{KEY}`: layers names {ending}, but no layer's name in {type(backbone.denoiser).__name__} ends "
                    "with it; see `named_modules()` of the denoiser"
                )
        self._found = list(dict.fromkeys(one for layers in found.values() for one in layers))

    @contextmanager
    def on(
        self, moved: Moved, backbone: Backbone, prompts: Sequence[str], conditioning: Conditioning, rows: Sequence[int]
    ) -> Iterator[Conditioning]:
        with ExitStack() as stack:
            for name, layer in self._found if moved.touched(rows) else []:
                stack.callback(layer.register_forward_hook(_adding(name, moved, rows)).remove)
            yield conditioning


def _adding(name: str, moved: Moved, rows: Sequence[int]) -> Any:
    def hook(_: nn.Module, given: Any, found: Any) -> Any:
        values = found[0] if isinstance(found, tuple) else found
        disturbed = added(values, moved.disturbance(name, tuple(values.shape[1:]), rows))
        return (disturbed, *found[1:]) if isinstance(found, tuple) else disturbed

    return hook


# Soft tokens in front of a prompt: the encoder reads placeholder tokens, and we replace their embeddings by our own.


#: The position where soft tokens begin, by the kind of encoder. In CLIP they come after the start token.
_PLACES = {"clip_text_model": 1, "t5": 0}


def _encoders(backbone: Backbone) -> list[tuple[str, int, Any, Any]]:
    """Each text encoder: name, where soft tokens begin, the encoder, its embeddings."""
    found = []
    for name in backbone.encoders():
        if name.startswith("text_encoder"):
            encoder = backbone.part(name)
            place = _PLACES.get(encoder.config.model_type, 0)
            found.append((name, place, encoder, encoder.get_input_embeddings()))
    return found


def _statistics(layer: Any) -> tuple[Tensor, Tensor]:
    """Mean embedding (d,), and the mean over d of their standard deviation ()."""
    weight = layer.weight.detach().float()
    return weight.mean(0), weight.std(0).mean()


@contextmanager
def _soft_tokens(encoder: Any, layer: Any, vectors: Tensor, start: int) -> Iterator[None]:
    """A context in which the encoder reads ``vectors`` (B, K, d) from position ``start`` on, before the prompt.

    The last K tokens are dropped: padding, or the end of a long prompt. The end token is kept.
    """
    count = vectors.shape[1]
    end = encoder.config.eos_token_id

    def moved(ids: Tensor, filler: int) -> Tensor:
        return torch.cat(
            [ids[:, :start], ids.new_full((len(ids), count), filler), ids[:, start : ids.shape[1] - count]], 1
        )

    def reading(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = given[0] if given else options["input_ids"]
        after = moved(ids, 0)
        # If a prompt fills all positions, the last one is its end token. Old CLIP files give 2 as the end token's id;
        # its position is then that of the highest id.
        last = ids.amax(1) if end in (None, 2) else torch.full_like(ids[:, -1], end)
        held = (after == last.unsqueeze(1)).any(1)
        after[:, -1] = torch.where(held, after[:, -1], last)
        if options.get("attention_mask") is not None:
            options = {**options, "attention_mask": moved(options["attention_mask"], 1)}
        if given:
            return (after, *given[1:]), options
        return given, {**options, "input_ids": after}

    def embedding(_: nn.Module, given: Any, found: Tensor) -> Tensor:
        return torch.cat([found[:, :start], vectors.to(found.dtype), found[:, start + count :]], 1)

    # T5 uses a second module with the same weights.
    weights = layer.weight.data_ptr()
    words = [one for one in encoder.modules() if isinstance(one, nn.Embedding) and one.weight.data_ptr() == weights]
    handles = [encoder.register_forward_pre_hook(reading, with_kwargs=True)]
    handles += [one.register_forward_hook(embedding) for one in words]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Memory:
    """The newest found disturbances, each with the category that it was found for.

    It changes only after an optimizer step, so that a batch, its micro-batches and its ranks all start from the same
    memory. What a step found is sorted by the pairs' own numbers and goes in front.

    Args:
        size: how many disturbances are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[str, Tensor] = {}
        self.category = torch.full((size,), -1, dtype=torch.int64)
        """-1: still empty."""
        self._new: list[dict[str, Tensor]] = []

    def picked(
        self, name: str, start: Tensor, categories: Sequence[int], again: Sequence[bool], which: Sequence[float]
    ) -> Tensor:
        """``start`` (n, *shape), with a remembered disturbance of the row's category where ``again`` allows it.

        Args:
            name: name of the disturbance.
            start: the values for all other rows.
            categories: the category of each row.
            again: which rows may begin with a remembered disturbance.
            which: a number in [0, 1) for each row, which chooses among several.
        """
        if name not in self.values:
            return start
        device = start.device
        values, category = self.values[name].to(device), self.category.to(device)
        fits = category.unsqueeze(0) == index(categories, device).unsqueeze(1)
        counts = fits.sum(1)
        u = torch.tensor(which, dtype=torch.float64).to(device, non_blocking=True)
        wanted = (u * counts).long()
        place = (fits & (fits.cumsum(1) - 1 == wanted.unsqueeze(1))).int().argmax(1)
        use = (counts > 0) & torch.tensor(again).to(device, non_blocking=True)
        return torch.where(use.view(-1, *[1] * (start.ndim - 1)), values.index_select(0, place), start)

    def keep(self, moved: Moved) -> None:
        """Keep what was found for a batch until the end of the step, with one row for each pair of the batch."""
        count, places = len(moved.batch), moved.attacked
        at = index(places, moved.device)

        def rows(values: Tensor, fill: int) -> Tensor:
            return values.new_full((count, *values.shape[1:]), fill).index_copy(0, at, values)

        found = {name: moved.found.get(name, torch.zeros(0, *shape)) for name, shape in moved.shapes.items()}
        self._new.append(
            {"category": rows(index(moved.categories(), moved.device), -1)}
            | {"order": rows(index(moved.order(), moved.device), 0)}
            | {name: rows(values.to(moved.device), 0) for name, values in found.items()}
        )

    def turn(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Put what all ranks found since the last call in front of the rest.

        Args:
            gather: a tensor of this rank -> those of all ranks, joined along the first dimension.
        """
        if not self._new:
            return
        new = {name: gather(torch.cat([one[name] for one in self._new])) for name in self._new[0]}
        self._new = []
        order = new.pop("order").argsort(stable=True)
        category = torch.cat([new["category"].index_select(0, order), self.category.to(order.device)])
        # Rows that were not attacked, and rows that are still empty, go to the end.
        kept = (category < 0).int().argsort(stable=True)[: self.size]
        self.category = category.index_select(0, kept)
        for name, values in new.items():
            if name == "category":
                continue
            old = self.values.get(name, torch.zeros(self.size, *values.shape[1:])).to(values.device)
            joined = torch.cat([values.index_select(0, order), old])
            self.values[name] = joined.index_select(0, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"category": self.category.cpu(), "values": {name: one.cpu() for name, one in self.values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``.

        Raises:
            ValueError: it holds another number of disturbances.
        """
        category, values = state["category"], dict(state["values"])
        if any(len(one) != self.size for one in (category, *values.values())):
            raise ValueError(f"replay is {self.size}, but the checkpoint holds {len(category)} disturbances")
        self.category, self.values, self._new = category, values, []
