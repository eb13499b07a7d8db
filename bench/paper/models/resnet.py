"""ResNets for small images (He et al., 2016, section 4.2), with shortcuts without weights (option A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper.models.parts import conv, initialise, widen

STAGE_CHANNELS = (16, 32, 64)


class Block(nn.Module):
    """y = relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels_in, channels, 3, stride)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x if self.stride == 1 else widen(x[:, :, :: self.stride, :: self.stride], y.shape[1])
        return F.relu(shortcut + y)


class ResNet(nn.Module):
    """ResNet-(6 n + 2): three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: 6 n + 2.
        stem_stride: 2 halves the image at once, for a CPU.
        channels: of the images.
        classes: of the last layer.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, depth: int, stem_stride: int = 1, *, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"Invalid {depth=} of a ResNet. Must be 6 n + 2.")
        width = STAGE_CHANNELS[0]
        self.stem = conv(channels, width, 3, stem_stride)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        for stage, channels_out in enumerate(STAGE_CHANNELS):
            for block in range(blocks):
                stages.append(Block(width, channels_out, stride=2 if stage and not block else 1))
                width = channels_out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(self.stages(F.relu(self.norm(self.stem(x)))).mean(dim=(2, 3)))
