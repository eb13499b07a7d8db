"""What several networks are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the image, but for its stride; a norm behind it has the bias."""
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)


def widen(x: Tensor, channels: int) -> Tensor:  # [B, C, H, W] -> [B, channels, H, W]
    """Zero channels behind those that are there: a shortcut to a wider layer without weights."""
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


def initialise(model: nn.Module) -> None:
    """He et al.'s normal weights for convolutions, no bias in the last layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
