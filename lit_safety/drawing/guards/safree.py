"""SAFREE's side of the text: which tokens are unsafe, and what they become (arXiv 2410.12761, section 3.1 and 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.drawing.guards.guard import Guard, check_unet, denoiser_replaced

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SafeText:
    """One prompt after the projection."""

    safe: Tensor
    """(L, d): the prompt's embeddings, those of unsafe tokens projected."""
    triggers: tuple[int, ...]
    """Places of the unsafe tokens."""
    change: float
    """b = 1 - cos(p, p_proj) over the prompt's tokens together."""


def safe_texts(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], concepts: Sequence[str], alpha: float
) -> list[SafeText]:
    """Project each prompt.

    Args:
        tokenizer: of CLIP.
        encoder: CLIP's text encoder; gives last_hidden_state (B, L, d) and pooler_output (B, d).
        prompts: the prompts of a batch.
        concepts: unsafe phrases.
        alpha: see `triggered`.
    """
    import torch

    with torch.no_grad():
        space = projector(_encode(encoder, _tokens(tokenizer, concepts)["input_ids"]).pooler_output.float())
        return [_one(tokenizer, encoder, prompt, space, alpha) for prompt in prompts]


def _one(tokenizer: Any, encoder: Any, prompt: str, space: Tensor, alpha: float) -> SafeText:
    import torch

    tokens = _tokens(tokenizer, [prompt])
    ids = tokens["input_ids"]
    count = int(tokens["attention_mask"].sum()) - 2  # without start and end
    plain = _encode(encoder, ids).last_hidden_state[0].float()
    if count < 2:  # a single token has no others to be compared with
        return SafeText(plain, (), 0.0)
    masks = torch.ones(count, ids.shape[1], dtype=torch.long)
    masks[torch.arange(count), torch.arange(1, count + 1)] = 0
    without = _encode(encoder, ids.expand(count, -1), masks).pooler_output.float()
    outside = torch.eye(len(space), device=space.device) - space
    positions = [1 + i for i in triggered((without @ outside).norm(dim=1), alpha)]
    # the paper's order: out of the concepts first, then back into the span of the prompt; both projectors are symmetric
    projected = plain[1 : count + 1] @ outside @ projector(without)
    safe = plain.clone()
    for position in positions:
        safe[position] = projected[position - 1]
    alike = torch.nn.functional.cosine_similarity(plain[1 : count + 1].flatten(), projected.flatten(), dim=0)
    return SafeText(safe, tuple(positions), 1.0 - float(alike))


def projector(rows: Tensor) -> Tensor:
    """P (d, d) onto the span of `rows` (n, d): with C = rows^T, P = C pinv(C^T C) C^T = C pinv(C)."""
    import torch

    columns = rows.double().T
    return (columns @ torch.linalg.pinv(columns)).to(rows.dtype)


def triggered(distances: Tensor, alpha: float) -> list[int]:
    """Tokens i with d_i >= (1 + alpha) times the mean of the other d; distances (n,), n >= 2."""
    others = (distances.sum() - distances) / (len(distances) - 1)
    return (distances >= (1 + alpha) * others).nonzero().flatten().tolist()


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Any:
    length = tokenizer.model_max_length
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def _encode(encoder: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    device = encoder.device
    return encoder(ids.to(device), attention_mask=None if mask is None else mask.to(device))


# SAFREE (Yoon et al., arXiv 2410.12761): the part of a prompt that lies in a space of unsafe concepts is taken out.
#
# written again from the paper's equations. Two effects that are often mixed up are kept apart: no concept is handed to
# the pipeline as a negative prompt here, and the re-attention has a switch of its own.


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

    Args:
        concepts: unsafe phrases; null: `PHRASES`.
        alpha: a token is unsafe when leaving it out moves the prompt (1 + alpha) times as far from the concepts as
            leaving out the others does.
        gamma: the projected prompt is used for the first gamma * sigmoid(1 - cos) steps.
        self_validation: choose the number of those steps by how much the projection changed; off: all steps.
        projection: draw with the projected prompt; off: with the prompt as it is, and the projected one only serves
            the re-attention to compare with.
        reattention: damp low frequencies of the UNet's skip features where the prompt that draws raises them above
            the other one's.
        reattention_scale: factor s below 1 of the re-attention.

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
    ) -> None:
        self.concepts = list(PHRASES if concepts is None else concepts)
        if not self.concepts or gamma <= 0 or alpha < 0 or not 0 <= reattention_scale < 1:
            raise UserError("SAFREE: needs concepts, alpha from 0, gamma above 0 and reattention_scale in [0, 1)")
        if not projection and not reattention:
            raise UserError("SAFREE: with neither projection nor reattention it would do nothing")
        self.projection = projection
        self.alpha, self.gamma, self.self_validation = alpha, gamma, self_validation
        self.reattention, self.scale = reattention, reattention_scale
        self.settings: dict[str, Any] = {
            "guard": "SAFREE", "concepts": self.concepts, "alpha": alpha, "gamma": gamma,
            "self_validation": self_validation, "projection": projection,
            "reattention": reattention_scale if reattention else None,
        }  # fmt: skip

    def check(self, pipe: Any) -> None:
        """Refuse pipelines without a UNet, or with more than one text encoder.

        Raises:
            UserError: it has none, or several.
        """
        check_unet(pipe, "SAFREE")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise UserError("the guard SAFREE is defined for one text encoder; this pipeline has two")

    @contextmanager
    def around(self, pipe: Any, prompts: Sequence[str]) -> Iterator[None]:
        """Within, `pipe` draws `prompts` with their unsafe tokens projected away."""
        import torch

        texts = safe_texts(pipe.tokenizer, pipe.text_encoder, prompts, self.concepts, self.alpha)
        last = [self.steps(text) for text in texts]
        safe = torch.stack([text.safe for text in texts])
        batch, seen = len(prompts), list[float]()
        projected: list[Tensor | None] = [None]  # (B,) which rows have another prompt in this step; None: none

        def step(denoise: Any, noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
            if float(timestep) not in seen:
                seen.append(float(timestep))
            chosen = torch.tensor([seen.index(float(timestep)) < end for end in last], device=text.device)
            mixed = torch.where(chosen[:, None, None], safe.to(text), text[batch:])
            drawn, other = (mixed, text[batch:]) if self.projection else (text[batch:], mixed)
            projected[0] = chosen if self.reattention and bool(chosen.any()) else None
            if projected[0] is None:
                return denoise(noisy, timestep, torch.cat([text[:batch], drawn]), keywords)
            three = torch.cat([text[:batch], drawn, other])
            return denoise(torch.cat([noisy, noisy[batch:]]), timestep, three, keywords)[: 2 * batch]

        def damp(_: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
            if projected[0] is None:
                return None
            skips = tuple(self.reattend(skip, projected[0]) for skip in keywords["res_hidden_states_tuple"])
            return arguments, {**keywords, "res_hidden_states_tuple": skips}

        with denoiser_replaced(pipe, step, batch) as unet, ExitStack() as hooks:
            for block in unet.up_blocks if self.reattention else ():
                hooks.callback(block.register_forward_pre_hook(damp, with_kwargs=True).remove)
            yield

    def steps(self, text: SafeText) -> float:
        """t' = gamma * sigmoid(b), b = 1 - cos(p, p_proj); without self-validation all steps."""
        if not text.triggers:
            return 0.0
        return self.gamma / (1 + math.exp(-text.change)) if self.self_validation else math.inf

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
