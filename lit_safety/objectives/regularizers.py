"""Terms that keep a preference-trained model drawing well; each is an option of every objective."""

from __future__ import annotations

from torch import Tensor


def sft_loss(policy_chosen: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen image: the policy's own denoising error e_w, (B,) -> (B,).

    Preference losses only see differences of errors and may let both errors grow; this term holds the chosen one
    down (the "RPO" term of Iterative RPO, Pang et al., arXiv 2404.19733, equation 1, in its diffusion form).
    """
    return policy_chosen


def anchor_loss(drift: Tensor, clean: Tensor) -> Tensor:
    """Squared distance of policy and reference predictions, on clean prompts only: (B,), (B,) -> (B,).

    For Gaussian denoisers the squared distance between predictions is, up to the timestep's weight, the KL
    divergence of one denoising step, so this is a direct KL penalty where the model was right to begin with.
    Harmful prompts contribute 0 and stay in the mean over the batch: the term's weight then does not depend on how
    a batch is split into micro-batches.
    """
    return drift * clean
