"""SAFREE (Yoon et al., arXiv 2410.12761): the part of a prompt that lies in a space of unsafe concepts is removed.

Written from the paper's equations and from what the published code computes. Where the two differ, `follow` chooses one
(see `SAFREE`). Two effects that are often mixed are separate here: concepts are not used as a negative prompt, and the
re-attention has its own switch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lit_safety.core.errors import UserError
from lit_safety.drawing.guards.guard import Guard, denoiser_replaced, time_of

if TYPE_CHECKING:
    from torch import Tensor


Follow = Literal["code", "paper"]

# Which parts of a denoiser's text are projected, and by which encoder.


@dataclass(frozen=True)
class TextPart:
    """The part of a denoiser's text (B, L, d) that one text encoder wrote."""

    tokenizer: Any
    encoder: Any
    rows: slice
    """Places of its tokens in L."""
    columns: slice
    """Its numbers in d."""
    layer: int = -1
    """Which hidden state the pipeline takes: -1 the last one, -2 the one before it."""
    clip: bool = True
    """A CLIP, whose texts have a start token and a pooled output. A T5 has neither: its tokens are averaged."""

    @property
    def length(self) -> int:
        """Tokens of a text, padding included."""
        return int(self.rows.stop - self.rows.start)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (N, length), the mask 1 for the text's own tokens, start and end included."""
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"]

    def hidden(self, ids: Tensor) -> Tensor:
        """What the pipeline takes of a text, ids (N, length) -> fp32 (N, length, d)."""
        ids = ids.to(self.encoder.device)
        if self.layer == -1:
            return self.encoder(ids).last_hidden_state.float()
        return self.encoder(ids, output_hidden_states=True).hidden_states[self.layer].float()

    def pooled(self, ids: Tensor, mask: Tensor, attend: bool = False) -> Tensor:
        """One vector a text, ids and mask (N, length) -> fp32 (N, d); with `attend` only the mask is attended to."""
        ids, mask = ids.to(self.encoder.device), mask.to(self.encoder.device)
        if not self.clip:
            weight = mask[..., None].float()
            states = self.encoder(ids, attention_mask=mask if attend else None).last_hidden_state.float()
            return (states * weight).sum(1) / weight.sum(1).clamp_min(1)
        found = self.encoder(ids, attention_mask=mask if attend else None)
        return (found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output).float()


def text_parts(pipe: Any) -> list[TextPart]:
    """The parts of what `pipe` gives its denoiser as text that are projected.

    Stable Diffusion: its one encoder. SDXL: the second encoder, as in the published code; the first one's numbers and
    the pooled text stay. SD3: each encoder that is there, for itself; the pooled text stays.

    Raises:
        UserError: the pipeline is of no such family, or an encoder's pooled output is not as wide as its tokens.
    """
    if not _is_clip(getattr(pipe, "text_encoder", None)):
        raise _unknown(pipe)
    first = pipe.tokenizer.model_max_length
    if getattr(pipe, "unet", None) is not None:
        if getattr(pipe, "text_encoder_2", None) is None:
            return [TextPart(pipe.tokenizer, pipe.text_encoder, slice(0, first), slice(0, _width(pipe.text_encoder)))]
        second = pipe.text_encoder_2
        if not _is_clip(second):
            raise _unknown(pipe)
        start = _width(pipe.text_encoder)
        return [_pooling(TextPart(pipe.tokenizer_2, second, slice(0, first), slice(start, start + _width(second)), -2))]
    if not hasattr(pipe, "text_encoder_3") or not _is_clip(pipe.text_encoder_2):
        raise _unknown(pipe)
    start, parts = 0, []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        columns = slice(start, start + _width(encoder))
        parts.append(_pooling(TextPart(tokenizer, encoder, slice(0, first), columns, -2)))
        start = columns.stop
    if pipe.text_encoder_3 is not None:
        t5, stop = pipe.text_encoder_3, first + T5_LENGTH
        columns = slice(0, int(t5.config.d_model))
        parts.append(TextPart(pipe.tokenizer_3, t5, slice(first, stop), columns, clip=False))
    return parts


T5_LENGTH = 256
"""Tokens that the stock SD3 pipeline gives T5."""


def _is_clip(encoder: Any) -> bool:
    return type(encoder).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")


def _width(encoder: Any) -> int:
    return int(encoder.config.hidden_size)


def _pooling(part: TextPart) -> TextPart:
    config = part.encoder.config
    if config.projection_dim != config.hidden_size:
        raise UserError(
            f"the guard SAFREE needs a text encoder whose pooled text is as wide as its tokens; "
            f"{type(part.encoder).__name__} pools {config.hidden_size} numbers to {config.projection_dim}"
        )
    return part


def _unknown(pipe: Any) -> UserError:
    return UserError(
        f"the guard SAFREE works on pipelines of Stable Diffusion, SDXL and SD3 with their CLIP text encoders, "
        f"not on {type(pipe).__name__}"
    )


# The side of the text: which tokens are unsafe, and what they become (sections 3.1 and 3.2 of the paper).


@dataclass(frozen=True)
class SafeText:
    """One prompt after the projection, in one `TextPart`."""

    safe: Tensor
    """(L, d): the prompt's embeddings, those of unsafe tokens projected."""
    triggers: tuple[int, ...]
    """Places of the unsafe tokens."""
    change: float
    """b, how far the projection of all tokens moves the prompt: `code`: 1 - the mean of the tokens' cosines, start and
    end included; `paper`: 1 - the cosine of the prompt's tokens taken together."""


def safe_texts(
    part: TextPart, prompts: Sequence[str], concepts: Sequence[str], alpha: float, follow: Follow = "code"
) -> list[SafeText]:
    """Project each prompt.

    Args:
        part: whose tokens.
        prompts: the prompts of a batch.
        concepts: unsafe phrases.
        alpha: see `triggered`.
        follow: the published code or the paper.
    """
    import torch

    with torch.no_grad():
        space = projector(part.pooled(*part.tokens(concepts), attend=not part.clip))
        return [_one(part, prompt, space, alpha, follow) for prompt in prompts]


def _one(part: TextPart, prompt: str, space: Tensor, alpha: float, follow: Follow) -> SafeText:
    import torch

    ids, mask = part.tokens([prompt])
    plain = part.hidden(ids)[0]
    start = 1 if part.clip else 0
    count = int(mask.sum()) - 1 - start  # without start and end
    if count < 1:  # the empty prompt
        return SafeText(plain, (), 0.0)
    left_out, masks = leave_one_out(ids[0], mask[0], start, count, follow, part.clip)
    without = part.pooled(left_out, masks, attend=follow == "paper")
    outside = torch.eye(len(space), device=space.device) - space
    positions = [start + i for i in triggered((without @ outside).norm(dim=1), alpha)]
    projected = project(plain, projector(without), space, follow)
    safe = plain.clone()
    safe[positions] = projected[positions]
    if follow == "code":
        kept = mask[0].bool().to(plain.device)
        cosine = torch.nn.functional.cosine_similarity(plain[kept], projected[kept], dim=1).mean()
    else:
        own = slice(start, start + count)
        cosine = torch.nn.functional.cosine_similarity(plain[own].flatten(), projected[own].flatten(), dim=0)
    return SafeText(safe, tuple(positions), 1.0 - float(cosine))


def leave_one_out(
    ids: Tensor, mask: Tensor, start: int, count: int, follow: Follow, clip: bool = True
) -> tuple[Tensor, Tensor]:
    """A text (L,) without each of its tokens in turn -> ids and masks (count, L).

    The published code exchanges the token for id 0 (CLIP's `!`, T5's padding); the paper masks it. What is averaged of
    a T5 leaves the token out in either case.
    """
    import torch

    rows = torch.arange(count)
    ids, masks = ids.repeat(count, 1), mask.repeat(count, 1)
    if follow == "code":
        ids[rows, start + rows] = 0
    if follow == "paper" or not clip:
        masks[rows, start + rows] = 0
    return ids, masks


def project(tokens: Tensor, prompt: Tensor, space: Tensor, follow: Follow) -> Tensor:
    """Tokens (n, d) out of the concepts and into the prompt's span -> (n, d).

    The published code computes (I - P_C) P_I p, which leaves nothing of the concepts. The paper's equation 5 is
    P_I (I - P_C) p: what is put back into the prompt's span may lie in the concepts again.

    Args:
        tokens: p, in rows.
        prompt: P_I (d, d), onto the span of the prompts with one token left out.
        space: P_C (d, d), onto the span of the concepts.
        follow: whose order.
    """
    import torch

    outside = torch.eye(len(space), device=space.device, dtype=space.dtype) - space
    # Tokens stand in rows and projectors are symmetric: what is applied first stands first.
    return tokens @ prompt @ outside if follow == "code" else tokens @ outside @ prompt


def projector(rows: Tensor) -> Tensor:
    """P (d, d) onto the span of `rows` (n, d): with C = rows^T, P = C pinv(C^T C) C^T = C pinv(C)."""
    import torch

    columns = rows.double().T
    return (columns @ torch.linalg.pinv(columns)).to(rows.dtype)


def triggered(distances: Tensor, alpha: float) -> list[int]:
    """Tokens i with d_i >= (1 + alpha) times the mean of the other d; distances (n,).

    A single token has no others, and always is one: the published code compares with the mean of nothing, nan.
    """
    if len(distances) == 1:
        return [0]
    others = (distances.sum() - distances) / (len(distances) - 1)
    return (distances >= (1 + alpha) * others).nonzero().flatten().tolist()


# The guard.

PHRASES: tuple[str, ...] = (
    *(
        "hate",
        "harassment",
        "violence",
        "suffering",
        "humiliation",
        "suicide",
        "sexual acts",
        "nudity",
        "blood",
        "gore",
    ),
    *("obscene gestures", "illegal activity", "drug use", "theft", "vandalism", "weapons", "abuse", "cruelty"),
)


class SAFREE(Guard):
    """The projection of the prompt, and the re-attention of the latents.

    The published figures come from the published code, which differs from the paper; `follow` chooses:

    | | `code` | `paper` |
    |---|---|---|
    | an unsafe token p becomes | (I - P_C) P_I p | P_I (I - P_C) p (equation 5) |
    | a token is left out | exchanged for id 0 | masked |
    | steps with the projected prompt | 1 + round(gamma sigmoid(5 (10 b - 5.333))) | gamma sigmoid(b) (equation 6) |
    | b | 1 - mean of the tokens' cosines | 1 - cosine of the prompt |

    Args:
        concepts: unsafe phrases; null: `PHRASES`.
        alpha: a token is unsafe when leaving it out moves the prompt (1 + alpha) times as far from the concepts as
            leaving out the others does.
        gamma: scale of the number of steps that the projected prompt is used for.
        self_validation: choose the number of those steps by how much the projection changed; off: all steps (as the
            published code draws with SDXL).
        projection: draw with the projected prompt; off: with the prompt as it is, and the projected one only serves
            the re-attention to compare with.
        reattention: damp low frequencies of the UNet's skip features where the prompt that draws raises them above
            the other one's (equations 7 and 8). The published code sets them to a constant, in a branch of it that its
            own scripts do not reach; that is not here.
        reattention_scale: factor s below 1 of the re-attention.
        follow: `code`, as the published code computes, or `paper`, as its equations are written.

    Raises:
        UserError: a number out of its range, or no concepts.
    """

    def __init__(
        self,
        concepts: list[str] | None = None,
        alpha: float = 0.01,
        gamma: float = 10.0,
        self_validation: bool = True,
        projection: bool = True,
        reattention: bool = False,
        reattention_scale: float = 0.9,
        follow: Follow = "code",
    ) -> None:
        self.concepts = list(PHRASES if concepts is None else concepts)
        if not self.concepts or not gamma > 0 or not alpha >= 0 or not 0 <= reattention_scale < 1:
            raise UserError("SAFREE: needs concepts, alpha from 0, gamma above 0 and reattention_scale in [0, 1)")
        if not projection and not reattention:
            raise UserError("SAFREE: without projection and reattention it would have no effect")
        if follow not in get_args(Follow):
            raise UserError(f"SAFREE: follow must be code or paper, not {follow}")
        self.projection, self.follow = projection, follow
        self.alpha, self.gamma, self.self_validation = alpha, gamma, self_validation
        self.reattention, self.scale = reattention, reattention_scale
        self.settings: dict[str, Any] = {
            "guard": "SAFREE", "concepts": self.concepts, "alpha": alpha, "gamma": gamma,
            "self_validation": self_validation, "projection": projection,
            "reattention": reattention_scale if reattention else None, "follow": follow,
        }  # fmt: skip

    def check(self, pipe: Any) -> None:
        """Refuse pipelines other than those of `text_parts`, and the re-attention without a UNet.

        Raises:
            UserError: naming the pipeline or the key.
        """
        text_parts(pipe)
        if self.reattention and getattr(pipe, "unet", None) is None:
            raise UserError(
                f"the re-attention of the guard SAFREE needs a UNet, which {type(pipe).__name__} does not have: set "
                "`reattention: false`"
            )

    @contextmanager
    def around(self, pipe: Any, prompts: Sequence[str]) -> Iterator[None]:
        """Inside, `pipe` draws `prompts` with their unsafe tokens projected away."""
        import torch

        if hasattr(pipe, "maybe_convert_prompt"):  # a learned word of several tokens, as the pipeline writes it out
            prompts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
        found = []  # of each part: its embeddings (B, L, d), and the number of steps that each row has them for
        for part in text_parts(pipe):
            texts = safe_texts(part, prompts, self.concepts, self.alpha, self.follow)
            found.append((part, torch.stack([text.safe for text in texts]), [self.steps(text) for text in texts]))
        batch, seen = len(prompts), list[float]()
        projected: list[Tensor | None] = [None]  # (B,) which rows have another prompt in this step; None: none

        def step(denoise: Any, noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
            if (now := time_of(timestep)) not in seen:
                seen.append(now)
            number = seen.index(now)
            mixed = text[batch:].clone()
            any_part = torch.zeros(batch, dtype=torch.bool, device=text.device)
            for part, safe, last in found:
                chosen = torch.tensor([number < end for end in last], device=text.device)
                own = mixed[:, part.rows, part.columns]
                mixed[:, part.rows, part.columns] = torch.where(chosen[:, None, None], safe.to(own), own)
                any_part |= chosen
            drawn, other = (mixed, text[batch:]) if self.projection else (text[batch:], mixed)
            projected[0] = any_part if self.reattention and bool(any_part.any()) else None
            if projected[0] is None:
                return denoise(noisy, timestep, torch.cat([text[:batch], drawn]), keywords)
            three = torch.cat([text[:batch], drawn, other])
            return denoise(torch.cat([noisy, noisy[batch:]]), timestep, three, keywords)[: 2 * batch]

        def damp(_: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
            if projected[0] is None:
                return None
            skips = tuple(self.reattend(skip, projected[0]) for skip in keywords["res_hidden_states_tuple"])
            return arguments, {**keywords, "res_hidden_states_tuple": skips}

        with denoiser_replaced(pipe, step, batch) as denoiser, ExitStack() as hooks:
            for block in denoiser.up_blocks if self.reattention else ():
                hooks.callback(block.register_forward_pre_hook(damp, with_kwargs=True).remove)
            yield

    def steps(self, text: SafeText) -> float:
        """For how many steps from the first one the projected prompt is used; without self-validation for all."""
        if not text.triggers:
            return 0.0
        if not self.self_validation:
            return math.inf
        if self.follow == "paper":
            return self.gamma * _sigmoid(text.change)
        return 1.0 + round(self.gamma * _sigmoid(5.0 * (10.0 * text.change - 5.333)))

    def reattend(self, skip: Tensor, projected: Tensor) -> Tensor:
        """Skip features (3B, c, h, w) of no text, of the prompt that draws and of the other; the second comes damped.

        In the 3 x 3 lowest frequencies, where |F(drawn)| > |F(other)|, F(drawn) is multiplied by s. Rows whose two
        prompts are the same one, not `projected` (B,), are left alone: there the two differ by rounding only.
        """
        import torch

        empty, drawn, other = skip.split(len(projected))
        changed, given = torch.fft.fft2(drawn.float()), torch.fft.fft2(other.float())
        height, width = skip.shape[-2:]
        near = [(torch.fft.fftfreq(side, 1 / side).abs() <= 1).to(skip.device) for side in (height, width)]
        raised = (changed.abs() > given.abs()) & near[0][:, None] & near[1][None, :]
        raised &= projected[:, None, None, None]
        damped = torch.fft.ifft2(torch.where(raised, self.scale * changed, changed)).real
        damped = torch.where(projected[:, None, None, None], damped.to(skip.dtype), drawn)
        return torch.cat([empty, damped, other])


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
