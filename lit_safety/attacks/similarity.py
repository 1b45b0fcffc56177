"""What a suffix search maximises: the similarity of a suffixed prompt to a goal, as the model sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_safety.attacks.lora_training import encode_images, read_images, shards_digest
from lit_safety.attacks.network import Network
from lit_safety.core.chance import LATENT, NOISE, derive, normal
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.drawing.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from lit_safety.attacks.target import Target
    from lit_safety.backbones.backbone import Conditioning


Likeness = Callable[["Conditioning", Tensor], Tensor]
"""Text encoders' outputs for N suffixed prompts, and the prompts' indices (N,) -> similarities (N,), with gradients."""


class Similarity(ABC):
    """A goal for every attacked prompt, and the similarity of a text to it."""

    text_only: ClassVar[bool] = False
    """Whether it needs only the text encoder: then the result is the same for all arms of one pipeline."""
    knows: ClassVar[str]
    """What the attacker must have to compute it."""
    settings: dict[str, Any]

    def check(self, attacked: Sequence[Prompt]) -> None:  # noqa: B027 (nothing to check)
        """Refuse what can be seen to be wrong before anything is loaded.

        Raises:
            UserError: a file is missing or lacks what is needed.
        """

    @abstractmethod
    def likeness(self, target: Target, network: Network, prompts: Sequence[str]) -> Likeness:
        """A function that computes the similarity of suffixed prompts to their goals.

        Args:
            target: the arm.
            network: the arm's networks.
            prompts: the attacked prompts' texts, without suffix.
        """


def text_rows(network: Network, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
    """The text encoders' outputs for any number of prompts, without gradients."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            parts.append(network.backbone.encode_text(prompts[start : start + batch_size]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# Ring-A-Bell's goal (Tsai et al., arXiv 2310.10012): the prompt's embedding, moved along the concept's direction.
#
#     c      = mean of E(prompts that name the concept) - mean of E(clean prompts)
#     goal   = E(prompt) + strength * c
#     score  = cosine of E(prompt + suffix) and goal, over all tokens' features together
#
# E uses only the pipeline's text encoder, which the denoiser's alignment does not change. So a suffix is found without
# the arm and then tried on every arm. (The paper minimises the squared distance with a genetic search.)


class ConceptDirection(Similarity):
    """Similarity to the prompt's embedding, moved along its concept's direction.

    Args:
        prompts: CSV with other prompts than the attacked ones: explicit prompts of every attacked concept (or
            category), and clean prompts.
        strength: how far it is moved.
        each: the largest number of prompts of a concept, and of clean prompts, for the means.
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
            raise UserError(f"{self.file}: holds no clean prompt, but ConceptDirection needs some")

    def _naming(self, prompt: Prompt, rows: Sequence[Prompt]) -> list[str]:
        explicit = [row for row in rows if row.kind == "explicit" and row.category == prompt.category]
        found = [row.prompt for row in explicit if row.concept == prompt.concept] or [row.prompt for row in explicit]
        if not found:
            raise UserError(
                f"{self.file}: holds no explicit prompt of {prompt.concept or prompt.category}, but ConceptDirection "
                "needs some of every attacked concept"
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
    """All outputs of a row concatenated, float32 (N, D)."""
    return torch.cat([conditioning[name].float().flatten(1) for name in sorted(conditioning)], dim=1)


def _mean(conditioning: Conditioning) -> Tensor:
    return flat(conditioning).mean(0)


# P4D's goal (Chin et al., arXiv 2309.06135): the aligned denoiser should predict what the base predicts for the prompt.
#
#     score = - mean over t of mean (eps_arm(x_t, t, prompt + suffix) - eps_base(x_t, t, prompt))^2
#
# x_t are noised images of the concept, the same ones for all candidates.


class PredictionMatch(Similarity):
    """Similarity of the arm's prediction for the suffixed prompt to the base's prediction for the prompt.

    Args:
        shards: preference shards; a harmful image of each attacked prompt's concept is noised.
        times: noise levels as positions in the noise schedule: 0 is clean, near 1 is pure noise.
    """

    knows: ClassVar[str] = "the arm's weights and the base's"

    def __init__(self, shards: str, times: Sequence[float] = (0.9, 0.6)) -> None:
        if not times or not all(0 <= t < 1 for t in times):
            raise UserError(f"PredictionMatch: times {list(times)}: must lie in [0, 1)")
        self.shards, self.times = shards, list(times)
        self.settings = {"goal": "the base's prediction", "shards": shards, "times": self.times}

    def check(self, attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, "SuffixSearch")

    def likeness(self, target: Target, network: Network, prompts: Sequence[str]) -> Likeness:
        backbone, base = network.backbone, target.base_network().backbone
        groups = list(dict.fromkeys(p.concept or p.category for p in target.prompts))
        examples = read_images(self.shards, len(groups), True, "SuffixSearch", groups)
        place = {example.group: number for number, example in enumerate(examples)}
        missing = [group for group in groups if group not in place]
        if missing:
            raise UserError(f"attack SuffixSearch: {self.shards} hold no harmful image of {', '.join(missing)}")
        chosen = [place[p.concept or p.category] for p in target.prompts]
        posterior = encode_images(backbone, examples, network.resolution)[chosen]
        text = text_rows(network, prompts)
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, time in enumerate(self.times):
            seeds = [derive(p.seed, f"prediction match {target.seed} {number}") for p in target.prompts]
            shape = tuple(posterior.shape[2:])
            spread, noise = (normal(seeds, what, shape).to(posterior.device) for what in (LATENT, NOISE))
            fractions = torch.full((len(seeds),), time, dtype=torch.float64)
            steps = backbone.timesteps(fractions, (shape[-2], shape[-1])).to(posterior.device)
            noisy = backbone.add_noise(backbone.latents(posterior, spread), noise, steps)
            with torch.no_grad():
                goal = torch.cat(
                    [
                        base.predict(noisy[i : i + 32], steps[i : i + 32], {k: v[i : i + 32] for k, v in text.items()})
                        for i in range(0, len(seeds), 32)
                    ]
                )
            shown.append((noisy, steps, goal.float()))

        def score(conditioning: Conditioning, numbers: Tensor) -> Tensor:
            errors = [
                (backbone.predict(noisy[numbers], steps[numbers], conditioning).float() - goal[numbers]).pow(2)
                for noisy, steps, goal in shown
            ]
            return -torch.stack([error.flatten(1).mean(1) for error in errors]).mean(0)

        return score
