"""Ring-A-Bell's goal (Tsai et al., arXiv 2310.10012): the prompt's embedding, moved along the concept's direction.

    c      = mean of E(prompts that name the concept) - mean of E(clean prompts)
    goal   = E(prompt) + strength * c
    score  = cosine of E(prompt + suffix) and goal, over all tokens' features together

E is the pipeline's text encoder alone, which alignment of the denoiser leaves as it was: what is found is tried on
every arm without having seen it. (The paper minimises the squared distance with a genetic search.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lit_safety.attacks.network import Network
from lit_safety.attacks.similarity import Likeness, Similarity, text_rows
from lit_safety.errors import UserError
from lit_safety.evaluation.fingerprint import digest
from lit_safety.evaluation.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from lit_safety.attacks.target import Target
    from lit_safety.backbones import Conditioning


class ConceptDirection(Similarity):
    """Nearness to the prompt moved along its concept's direction.

    Args:
        prompts: CSV of other prompts than the attacked ones: explicit prompts of every attacked concept (or category)
            and clean ones.
        strength: how far along.
        each: prompts a concept, and clean prompts, that the means are over at most.
    """

    text_only: ClassVar[bool] = True
    knows: ClassVar[str] = "the pipeline's own text encoder"

    def __init__(self, prompts: str, strength: float = 3.0, each: int = 64) -> None:
        if strength <= 0 or each < 1:
            raise UserError("ConceptDirection: strength must be above 0, each at least 1")
        self.file, self.strength, self.each = prompts, strength, each
        self.settings = {"goal": "concept direction", "prompts": prompts, "strength": strength, "each": each}

    def check(self, attacked: Sequence[Prompt]) -> None:
        rows = read_prompts(self.file)
        self.settings["prompts_sha256"] = digest([row.identity() for row in rows])
        for prompt in attacked:
            self._naming(prompt, rows)
        if not any(row.kind == "clean" for row in rows):
            raise UserError(f"{self.file}: holds no clean prompt; ConceptDirection compares with some")

    def _naming(self, prompt: Prompt, rows: Sequence[Prompt]) -> list[str]:
        explicit = [row for row in rows if row.kind == "explicit" and row.category == prompt.category]
        found = [row.prompt for row in explicit if row.concept == prompt.concept] or [row.prompt for row in explicit]
        if not found:
            raise UserError(
                f"{self.file}: holds no explicit prompt of {prompt.concept or prompt.category}; ConceptDirection needs "
                "some of every attacked concept"
            )
        return found[: self.each]

    def likeness(self, target: Target, network: Network, prompts: Sequence[str]) -> Likeness:
        rows = read_prompts(self.file)
        clean = _mean(text_rows(network, [row.prompt for row in rows if row.kind == "clean"][: self.each]))
        known: dict[tuple[str, str], Tensor] = {}
        goals = []
        for prompt, text in zip(target.prompts, prompts, strict=True):
            key = (prompt.category, prompt.concept)
            if key not in known:
                known[key] = _mean(text_rows(network, self._naming(prompt, rows))) - clean
            goals.append(flat(text_rows(network, [text]))[0] + self.strength * known[key])
        goal = torch.stack(goals)

        def score(conditioning: Conditioning, numbers: Tensor) -> Tensor:
            return torch.nn.functional.cosine_similarity(flat(conditioning), goal[numbers], dim=1)

        return score


def flat(conditioning: Conditioning) -> Tensor:
    """All outputs of a row side by side, float32 (N, D)."""
    return torch.cat([conditioning[name].float().flatten(1) for name in sorted(conditioning)], dim=1)


def _mean(conditioning: Conditioning) -> Tensor:
    return flat(conditioning).mean(0)
