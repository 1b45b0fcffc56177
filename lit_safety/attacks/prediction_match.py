"""P4D's goal (Chin et al., arXiv 2309.06135): the aligned denoiser is to predict what the base predicts for the prompt.

    score = - mean over t of mean (eps_arm(x_t, t, prompt + suffix) - eps_base(x_t, t, prompt))^2

x_t are noised pictures of the concept, the same ones in all candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lit_safety.attacks.network import Network
from lit_safety.attacks.pictures import encode_pictures, read_pictures, shards_digest
from lit_safety.attacks.similarity import Likeness, Similarity, text_rows
from lit_safety.data.chance import LATENT, NOISE, derive, normal
from lit_safety.errors import UserError
from lit_safety.evaluation.prompts import Prompt

if TYPE_CHECKING:
    from lit_safety.attacks.target import Target
    from lit_safety.backbones import Conditioning


class PredictionMatch(Similarity):
    """Nearness of the arm's prediction for the suffixed prompt to the base's for the prompt.

    Args:
        shards: preference shards; a harmful picture of each attacked prompt's concept is noised.
        times: how noisy, as places in the noise schedule: 0 clean, towards 1 pure noise.
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
        pictures = read_pictures(self.shards, len(groups), True, "SuffixSearch", groups)
        place = {picture.group: number for number, picture in enumerate(pictures)}
        missing = [group for group in groups if group not in place]
        if missing:
            raise UserError(f"attack SuffixSearch: {self.shards} hold no harmful picture of {', '.join(missing)}")
        chosen = [place[p.concept or p.category] for p in target.prompts]
        posterior = encode_pictures(backbone, pictures, network.resolution)[chosen]
        text = text_rows(network, prompts)
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, time in enumerate(self.times):
            seeds = [derive(p.seed, f"prediction match {target.seed} {number}") for p in target.prompts]
            shape = tuple(posterior.shape[2:])
            spread, noise = (normal(seeds, what, shape).to(posterior.device) for what in (LATENT, NOISE))
            steps = backbone.timesteps(torch.full((len(seeds),), time, dtype=torch.float64)).to(posterior.device)
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
