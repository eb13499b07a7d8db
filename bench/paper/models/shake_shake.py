"""Shake-Shake ResNets (Gastaldi, 2017): two branches in random shares, others in their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper.models.parts import conv, initialise

STEM_CHANNELS = 16
STAGES, BLOCKS = 3, 4  # 26 layers: stem, 3 * 4 blocks of two, head


class _Mix(torch.autograd.Function):
    """alpha a + (1 - alpha) b, with the gradients beta and 1 - beta."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return torch.lerp(b, a, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (beta,) = ctx.saved_tensors
        return beta * grad, (1 - beta) * grad, None, None


def shake(a: Tensor, b: Tensor, training: bool) -> Tensor:
    """Random shares of two branches for each image ("Shake-Shake-Image"), their mean in evaluation.

    Args:
        a, b: [B, C, H, W].
        training: draw the shares, alpha and beta uniform in [0, 1].
    """
    if not training:
        return (a + b) / 2
    alpha, beta = torch.rand(2, len(a), 1, 1, 1, device=a.device, dtype=a.dtype)
    return _Mix.apply(a, b, alpha, beta)


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


class Block(nn.Module):
    """y = shortcut(x) + shake(branch(x), branch(x))."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.left = _branch(channels_in, channels, stride)
        self.right = _branch(channels_in, channels, stride)
        same_shape = channels_in == channels
        self.shortcut = nn.Identity() if same_shape else Shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        return self.shortcut(x) + shake(self.left(x), self.right(x), self.training)


class ShakeShake(nn.Module):
    """Shake-Shake 26 2 x width d: three stages of four blocks with width, 2 width and 4 width channels."""

    def __init__(self, width: int, *, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Invalid {width=}. Must be >= 1.")
        self.stem = nn.Sequential(conv(channels, STEM_CHANNELS, 3), nn.BatchNorm2d(STEM_CHANNELS))
        blocks: list[nn.Module] = []
        channels_in = STEM_CHANNELS
        for stage in range(STAGES):
            for block in range(BLOCKS):
                blocks.append(Block(channels_in, width << stage, stride=2 if stage and not block else 1))
                channels_in = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(F.relu(self.blocks(self.stem(x))).mean(dim=(2, 3)))
