"""Mixup (Zhang et al., ICLR 2018): train on convex combinations of pairs of examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(
    images: Tensor, labels: Tensor, alpha: float, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every example with another of its batch, all in the same proportion (section 2 of the paper).

        x = a x_i + (1 - a) x_j,  y = a y_i + (1 - a) y_j,  a ~ Beta(alpha, alpha),  j a permutation of i

    Args:
        images: [B, C, H, W] float32.
        labels: [B] int64.
        alpha: > 0.
        classes: labels are below it.
        generator: of the CPU.

    Returns:
        The images, and the probabilities [B, classes] float32 of the classes.
    """
    if not alpha > 0:
        raise ValueError(f"Invalid {alpha=}. Must be > 0.")
    # Beta(alpha, alpha) is the share of one of two equal Gamma variables; torch.distributions takes no generator.
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator)
    share = float(gammas[0] / gammas.sum())
    partner = torch.randperm(len(labels), generator=generator).to(labels.device)
    targets = F.one_hot(labels, classes).float()
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)
