"""The bottleneck ResNet that the Keras report trains: blocks of 1x1, 3x3 and 1x1 convolutions with biases."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.models import stages

STEM_CHANNELS = 16
NARROW = {64: 16, 128: 64, 256: 128}  # channels of a stage, and of its 3x3 convolutions


def _conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2)


class Block(nn.Module):
    """y = relu(shortcut(x) + branch(x)); the shortcut to a wider layer is a convolution without a norm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        narrow = NARROW[channels]
        parts: list[nn.Module] = []
        for into, out, kernel in ((channels_in, narrow, 1), (narrow, narrow, 3), (narrow, channels, 1)):
            parts += [_conv(into, out, kernel, stride if kernel == 3 else 1), nn.BatchNorm2d(out), nn.ReLU()]
        self.branch = nn.Sequential(*parts[:-1])
        self.shortcut = nn.Identity() if channels_in == channels else _conv(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        return F.relu(self.shortcut(x) + self.branch(x))


class BottleneckResNet(nn.Module):
    """ResNet-(9 n + 2): three stages of n blocks with 64, 128 and 256 channels, and a last norm before the mean.

    With n = 2 Keras counts 575,114 parameters, the running statistics of its norms among them. The first weights have
    Keras's scale: variance 2 / fan-in. BatchNorm's momentum and epsilon are torch's.
    """

    def __init__(self, depth: int, stem_stride: int = 1, *, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 9)
        if rest or blocks < 1:
            raise ValueError(f"Invalid {depth=} of a bottleneck ResNet. Must be 9 n + 2.")
        stem = _conv(channels, STEM_CHANNELS, 3, stem_stride), nn.BatchNorm2d(STEM_CHANNELS), nn.ReLU()
        self.stem = nn.Sequential(*stem)
        self.stages = stages(Block, STEM_CHANNELS, list(NARROW), blocks)
        self.norm = nn.BatchNorm2d(max(NARROW))
        self.head = nn.Linear(max(NARROW), classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(F.relu(self.norm(self.stages(self.stem(x)))).mean(dim=(2, 3)))
