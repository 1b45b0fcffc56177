"""Drawing for a user with a stock diffusers pipeline: `load_psa(pipe, folder)`, then `pipe(prompt, user=...)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_safety.adapters.user_attention import PROJECTION, UserAdapter, detach, user_arguments
from lit_safety.adapters.user_file import attach_weights, find_user_adapter, read_weights
from lit_safety.core.errors import UserError
from lit_safety.users.table import USERS_FILE, Users, UserTable

#: A user in a call: an id of `users.safetensors`, or None for the null user.
UserId = str | None


def load_psa(pipe: Any, path: str | Path, scale: float = 1.0, users: str | Path | None = None) -> None:
    """Load a user adapter into a stock diffusers pipeline; from then on every call draws for a user.

    `pipe(prompt, user="0000033")` looks the user up in `users.safetensors`. `user=["0000033", None]` gives each prompt
    of a batch its own user; None is the null user, who is also used if no user is named. `pipe(prompt,
    user_embeds=tensor)` takes embeddings (D,) or (B, D) instead. An id that is not in the file is an error, or the null
    user with `unknown_user="null"`. Under guidance the conditional half gets prompt and user, the unconditional half
    negative prompt and null user. Everything else, LoRAs included, is the pipeline's own call. If the pipeline already
    has an adapter, the new one replaces it; if the new one does not fit, the old one stays.

    Args:
        pipe: a pipeline of Stable Diffusion or SDXL that draws from text, redraws images or inpaints.
        path: a folder or file written by this package, or of the published layout.
        scale: weight of the user branch, a finite number; 0 is the base model, to the bit.
        users: a `users.safetensors`, or its folder; None: the one next to the adapter, if there is one.

    Raises:
        UserError: files are missing, damaged or made for another backbone, or `pipe` is of another family.
    """
    families = _families()
    if not isinstance(pipe, families):
        names = ", ".join(family.__name__ for family in families)
        raise UserError(f"{type(pipe).__name__} cannot draw for a user: load the adapter into one of {names}")
    if not math.isfinite(scale):
        raise UserError(f"scale {scale}: the weight of the user branch must be a finite number")
    beside = find_user_adapter(path).parent / USERS_FILE
    known = Users(users) if users is not None else Users(beside) if beside.is_file() else None
    stock: Any = pipe
    weights = read_weights(stock.unet, path)
    if known is not None and known.dimension != weights.embedding_dim:
        raise UserError(
            f"{known.file} has embeddings of {known.dimension} numbers, but the adapter {path} was trained on "
            f"{weights.embedding_dim}: use the text model that it was trained with"
        )
    if getattr(stock.unet, PROJECTION, None) is not None:  # of this pipeline, or of another with the same UNet
        detach(stock.unet)
    adapter = attach_weights(stock.unet, weights)
    for _, parameter in adapter.named_parameters():
        parameter.requires_grad_(False)
    for layer in adapter.layers.values():
        layer.to(stock.unet.dtype)  # masters are for training; the projection stays in fp32
    adapter.set_scale(scale)
    draw_for_users(stock, known)


def draw_for_users(pipe: Any, users: Users | UserTable | None) -> None:
    """Give `pipe`, whose UNet has user attention, the call that `load_psa` describes."""
    if not isinstance(pipe, DrawsForUsers):
        stock: type = type(pipe)
        pipe.__class__ = _with_users(stock)
    pipe._users = users


def same_users(pipe: Any, other: Any) -> None:
    """If `pipe` draws for users, let `other`, a pipeline with the same UNet, draw for the same users."""
    if isinstance(pipe, DrawsForUsers):
        draw_for_users(other, pipe._users)


def unload_psa(pipe: Any) -> None:
    """Make `pipe` the stock pipeline that it was before `load_psa`.

    Raises:
        UserError: nothing was loaded into it.
    """
    if not isinstance(pipe, DrawsForUsers):
        raise UserError(f"no user adapter was loaded into this {type(pipe).__name__}")
    detach(pipe.unet)
    pipe.__class__ = type(pipe)._stock
    del pipe._users


class DrawsForUsers:
    """What `load_psa` adds to a pipeline's class. It is not a fork: it calls the pipeline's own method."""

    unet: Any
    _stock: ClassVar[type]
    """The pipeline's own class."""
    _execution_device: torch.device
    _users: Users | UserTable | None

    def __call__(
        self,
        *args: Any,
        user: UserId | Sequence[UserId] = None,
        user_embeds: Tensor | None = None,
        unknown_user: Literal["error", "null"] = "error",
        **kwargs: Any,
    ) -> Any:
        call = super().__call__  # type: ignore[misc]  # the pipeline's
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        adapter = UserAdapter.of(self.unet)
        count = _prompts(options)
        if user_embeds is None:
            embeds, known = self._look_up(user, count, unknown_user, adapter.projection.embedding_dim)
        elif user is not None:
            raise UserError("give `user` or `user_embeds`, not both")
        else:
            embeds, known = _checked(user_embeds, count, adapter.projection.embedding_dim)
        count = options["num_images_per_prompt"]
        embeds, known = embeds.repeat_interleave(count, 0), known.repeat_interleave(count)
        if options["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None:  # as the pipelines decide
            # In the pipelines' order: the unconditional half first.
            embeds, known = torch.cat([embeds, embeds]), torch.cat([torch.zeros_like(known), known])
        device = next(adapter.projection.parameters()).device
        if device.type == "meta":  # offloaded layer by layer; each layer is fetched when it is called
            device = self._execution_device
        with torch.no_grad():
            tokens = adapter.projection(embeds.to(device), known.to(device))
        tokens = tokens.to(self._execution_device, self.unet.dtype)
        own = dict(options["cross_attention_kwargs"] or {})
        options["cross_attention_kwargs"] = own | user_arguments(tokens)["cross_attention_kwargs"]
        return call(*bound.args, **bound.kwargs)

    def _look_up(
        self, user: UserId | Sequence[UserId], count: int, unknown: str, dimension: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (count, D) and who is known (count,)."""
        if not isinstance(user, str | Sequence | None):
            raise UserError(f"`user` is an id such as '0000033', or a list of them, not {user!r}")
        ids = [user] * count if user is None or isinstance(user, str) else list(user)
        if len(ids) != count:
            raise UserError(f"{len(ids)} users for {count} prompts: give one user, or one for each prompt")
        if unknown == "null":
            ids = [one if self._users is not None and one in self._users.ids else None for one in ids]
        elif unknown != "error":
            raise UserError(f"unknown_user is 'error' or 'null', not {unknown!r}")
        named = [one for one in ids if one is not None]
        if named and self._users is None:
            raise UserError(
                f"user {named[0]!r} cannot be looked up: {USERS_FILE} is missing next to the adapter; give "
                "load_psa(..., users=FILE), or the embedding as `user_embeds`"
            )
        embeds = torch.zeros(count, dimension)
        known = torch.tensor([one is not None for one in ids], dtype=torch.bool)
        if self._users is not None and named:
            embeds[known] = self._users.embeddings(named)
        return embeds, known

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the folder would load without the user's bounds and without an error.

        Raises:
            UserError: always.
        """
        raise UserError("a pipeline with a user adapter cannot be saved: call unload_psa(pipe) first, and keep both")


def draws_for_users(pipe: Any) -> bool:
    """Whether `load_psa` has prepared a pipeline, so that its call takes `user`."""
    return isinstance(pipe, DrawsForUsers)


@cache
def _families() -> tuple[type, ...]:
    """Pipelines whose calls handle prompts, images a prompt and guidance in the same way."""
    import diffusers

    return tuple(
        getattr(diffusers, f"StableDiffusion{family}{task}Pipeline")
        for family in ("", "XL")
        for task in ("", "Img2Img", "Inpaint")
    )


@cache
def _with_users(base: type) -> type:
    # The same name, because diffusers stores it and looks it up.
    return type(base.__name__, (DrawsForUsers, base), {"__module__": base.__module__, "_stock": base})


def _prompts(options: dict[str, Any]) -> int:
    """How many prompts a call has, as the pipelines count them."""
    prompt = options["prompt"]
    if isinstance(prompt, str):
        return 1
    rows = prompt if prompt is not None else options["prompt_embeds"]
    if rows is None:
        raise UserError("give a prompt, or prompt_embeds")
    return len(rows)


def _checked(embeds: Tensor, count: int, dimension: int) -> tuple[Tensor, Tensor]:
    given = torch.as_tensor(embeds).detach().float().cpu()
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or rows.shape[1] != dimension:
        raise UserError(
            f"`user_embeds` has shape {tuple(given.shape)}; the adapter was trained on embeddings of {dimension} "
            f"numbers: give ({dimension},) or (prompts, {dimension})"
        )
    if len(rows) not in (1, count):
        raise UserError(f"{len(rows)} user embeddings for {count} prompts: give one, or one for each prompt")
    for index, row in enumerate(rows):
        if not torch.isfinite(row).all():
            raise UserError(f"`user_embeds`: row {index} holds numbers that are not finite")
    return rows.expand(count, -1), torch.ones(count, dtype=torch.bool)
