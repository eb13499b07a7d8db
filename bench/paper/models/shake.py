"""Shake-Shake ResNets (Gastaldi, 2017): two branches in random shares, others in their gradients.

And ShakeDrop (Yamada et al., 2019): noise on a residual branch, another in its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.models import conv, initialise, stages

STEM_CHANNELS = 16
STAGES, BLOCKS = 3, 4  # 26 layers: stem, 3 * 4 blocks of two, head


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


class Noise(nn.Module):
    """A layer whose gradient has other random shares than its output, or the same with `true_gradient`.

    Either way it draws as many numbers, so that two passes from one random state see the same.
    """

    true_gradient = False


class ShakeDrop(Noise):
    """(b + alpha - b alpha) x in training, its mean `keep` times x in evaluation.

    b is 1 with probability `keep`; alpha is uniform in [-1, 1]. In the gradient beta, uniform in [0, 1], stands in
    alpha's place. They are drawn for each image; b for the batch as a whole where `per_image` is False.
    """

    def __init__(self, keep: float, per_image: bool = True) -> None:
        super().__init__()
        if not 0 <= keep <= 1:
            raise ValueError(f"Invalid {keep=}. Must be in [0, 1].")
        self.keep, self.per_image = keep, per_image

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        if not self.training:
            return self.keep * x
        kept = torch.rand(len(x) if self.per_image else 1, 1, 1, 1, device=x.device) < self.keep
        alpha, beta = torch.rand(2, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
        forward = torch.where(kept, 1, 2 * alpha - 1)
        return _Scale.apply(x, forward, forward if self.true_gradient else torch.where(kept, 1, beta))


def shake(a: Tensor, b: Tensor, training: bool, true_gradient: bool = False) -> Tensor:
    """Return random shares of two branches for each image ("Shake-Shake-Image"), their mean in evaluation."""
    if not training:
        return (a + b) / 2
    alpha, beta = torch.rand(2, len(a), 1, 1, 1, device=a.device, dtype=a.dtype)
    beta = alpha if true_gradient else beta
    return _Scale.apply(a, alpha, beta) + _Scale.apply(b, 1 - alpha, 1 - beta)


def _branch(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        conv(channels_in, channels, 3, stride),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        conv(channels, channels, 3),
        nn.BatchNorm2d(channels),
    )


class Shortcut(nn.Module):
    """To a wider layer: half the channels from every `stride`-th pixel, half from its neighbour down and right."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.left = conv(channels_in, channels // 2, 1)
        self.right = conv(channels_in, channels - channels // 2, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        sides = [side[:, :, :: self.stride, :: self.stride] for side in (x, shifted)]
        return self.norm(torch.cat([self.left(sides[0]), self.right(sides[1])], dim=1))


class Block(Noise):
    """y = shortcut(x) + shake(branch(x), branch(x))."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.left = _branch(channels_in, channels, stride)
        self.right = _branch(channels_in, channels, stride)
        same_shape = channels_in == channels
        self.shortcut = nn.Identity() if same_shape else Shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        return self.shortcut(x) + shake(self.left(x), self.right(x), self.training, self.true_gradient)


class ShakeShake(nn.Module):
    """Shake-Shake 26 2 x width d: three stages of four blocks with width, 2 width and 4 width channels."""

    def __init__(self, width: int, *, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Invalid {width=}. Must be >= 1.")
        self.stem = nn.Sequential(conv(channels, STEM_CHANNELS, 3), nn.BatchNorm2d(STEM_CHANNELS))
        self.blocks = stages(Block, STEM_CHANNELS, [width << stage for stage in range(STAGES)], BLOCKS)
        self.head = nn.Linear(width << (STAGES - 1), classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(F.relu(self.blocks(self.stem(x))).mean(dim=(2, 3)))
