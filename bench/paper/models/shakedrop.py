"""ShakeDrop (Yamada et al., 2019): noise on a residual branch, another in its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Scale(torch.autograd.Function):
    """forward * x, with the gradient backward * grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return forward * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (backward,) = ctx.saved_tensors
        return backward * grad, None, None


class ShakeDrop(nn.Module):
    """(b + alpha - b alpha) x in training, its mean `keep` times x in evaluation.

    b is 1 with probability `keep`, for the batch as a whole; alpha is uniform in [-1, 1]. In the gradient beta, uniform
    in [0, 1], stands in alpha's place. alpha and beta are drawn for each image.

    Raises:
        ValueError: `keep` is no probability.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        if not 0 <= keep <= 1:
            raise ValueError(f"Invalid {keep=}. Must be in [0, 1].")
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        if not self.training:
            return self.keep * x
        kept = torch.rand((), device=x.device) < self.keep
        alpha, beta = torch.rand(2, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
        return _Scale.apply(x, torch.where(kept, 1, 2 * alpha - 1), torch.where(kept, 1, beta))
