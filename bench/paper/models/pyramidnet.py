"""PyramidNets (Han et al., 2017): every block a little wider than the one before; with ShakeDrop as an option."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper.models.shake import ShakeDrop
from bench.training.models import conv, initialise, widen

STEM_CHANNELS = 16
STAGES = 3
EXPANSION = 4  # of a bottleneck
LAST_KEEP = 0.5  # ShakeDrop's probability to leave the last block alone; that of block l is 1 - (1 - LAST_KEEP) l / L


class Block(nn.Module):
    """y = shortcut(x) + branch(x), where no relu comes before the first convolution or after the last norm.

    Args:
        channels_in: of x.
        width: channels of the 3x3 convolutions.
        stride: of the first of them.
        bottleneck: 1x1, 3x3, 1x1 to four times the width, instead of two 3x3.
        drop: what is done to the branch at its end, or None.
    """

    def __init__(self, channels_in: int, width: int, stride: int, *, bottleneck: bool, drop: ShakeDrop | None) -> None:
        super().__init__()
        layers = (
            [(width, 1, 1), (width, 3, stride), (EXPANSION * width, 1, 1)]
            if bottleneck
            else [(width, 3, stride), (width, 3, 1)]
        )
        parts: list[nn.Module] = [nn.BatchNorm2d(channels_in)]
        channels = channels_in
        for number, (channels_out, kernel, step) in enumerate(layers):
            parts += [nn.ReLU()] if number else []
            parts += [conv(channels, channels_out, kernel, step), nn.BatchNorm2d(channels_out)]
            channels = channels_out
        if drop is not None:
            parts.append(drop)
        self.branch = nn.Sequential(*parts)
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C, H / stride, W / stride]
        shortcut = x if self.stride == 1 else F.avg_pool2d(x, self.stride)
        return widen(shortcut, self.channels) + self.branch(x)


class PyramidNet(nn.Module):
    """PyramidNet-depth with widening alpha: block k of N has 16 + alpha k / N channels.

    Args:
        depth: number of layers.
        alpha: by how many channels the last block is wider than the stem.
        bottleneck: what blocks are like.
        shakedrop: whether branches are dropped; `per_image`: for each image of a batch apart.
        rounded: the channels, as in SAM's released code and others; or down, as in the paper of PyramidNets.
        channels: of the images.
        classes: of the last layer.
    """

    def __init__(
        self,
        depth: int,
        alpha: int,
        *,
        bottleneck: bool,
        shakedrop: bool = False,
        per_image: bool = True,
        rounded: bool = True,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        layers = STAGES * (3 if bottleneck else 2)
        blocks, rest = divmod(depth - 2, layers)
        if rest or blocks < 1:
            raise ValueError(f"Invalid {depth=} of a PyramidNet. Must be {layers} n + 2.")
        count = STAGES * blocks
        width = STEM_CHANNELS
        self.stem = nn.Sequential(conv(channels, width, 3), nn.BatchNorm2d(width))
        parts: list[Block] = []
        for k in range(1, count + 1):
            drop = ShakeDrop(1 - (1 - LAST_KEEP) * k / count, per_image) if shakedrop else None
            stride = 2 if k > 1 and k % blocks == 1 % blocks else 1
            wider = STEM_CHANNELS + (round(alpha * k / count) if rounded else alpha * k // count)
            block = Block(width, wider, stride, bottleneck=bottleneck, drop=drop)
            width = block.channels
            parts.append(block)
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean(dim=(2, 3)))
