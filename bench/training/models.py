"""Wide pre-activation ResNets for small images (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGE_CHANNELS = (16, 32, 64)


class Block(nn.Module):
    """y = shortcut(x) + conv(relu(bn(conv(relu(bn(x))))))."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same_shape = stride == 1 and channels_in == channels
        self.shortcut = None if same_shape else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        active = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(active))))


class WideResNet(nn.Module):
    """WRN-(6 * blocks + 4)-width: three stages of `blocks` blocks with 16, 32 and 64 times `width` channels.

    Args:
        blocks: blocks per stage; 4 with width 10 is the paper's WRN-28-10.
        width: multiplier of the channels.
        stem_stride: 2 halves the image at once, which makes a small net on a CPU four times as fast.
        channels: of the images.
        classes: of the last layer.
    """

    def __init__(self, blocks: int, width: int, stem_stride: int = 1, *, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        if blocks < 1 or width < 1:
            raise ValueError(f"Invalid {blocks=}, {width=}. Must be >= 1.")
        features = STAGE_CHANNELS[0]
        self.stem = nn.Conv2d(channels, features, 3, stem_stride, padding=1, bias=False)
        stages: list[nn.Module] = []
        for stage, base in enumerate(STAGE_CHANNELS):
            for block in range(blocks):
                stages.append(Block(features, base * width, stride=2 if stage and not block else 1))
                features = base * width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(features)
        self.head = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        features = F.relu(self.norm(self.stages(self.stem(x))))
        return self.head(features.mean(dim=(2, 3)))


def parameter_count(model: torch.nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in model.parameters())
