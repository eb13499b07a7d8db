"""ResNet-50 and Vision Transformers at 224 x 224, as in torchvision but without dropout; no package needed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 1000


def _conv_norm(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.reduce = _conv_norm(channels, width, 1)
        self.conv = _conv_norm(width, width, 3, stride)
        self.expand = _conv_norm(width, 4 * width, 1)
        self.shortcut = _conv_norm(channels, 4 * width, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 width, H / stride, W / stride]
        y = self.expand(F.relu(self.conv(F.relu(self.reduce(x), inplace=True)), inplace=True))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet50(nn.Module):
    """He et al., 2016, with the stride in the 3x3 convolutions, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 64, 7, stride=2)
        blocks: list[nn.Module] = []
        channels = 64
        for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(channels, width, stride, project=not block))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, stride=2, padding=1)
        return self.head(self.blocks(x).mean(dim=(2, 3)))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Positions, blocks and the last norm; smaller images use the first positions only."""

    def __init__(self, depth: int, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        return self.norm(self.blocks(x + self.positions[:, : x.shape[1]]))


class ViT16(nn.Module):
    """ViT of this depth and width with patches of 16 x 16 (Dosovitskiy et al., 2021)."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        patch = 16
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.encoder = Encoder(depth, width, heads, tokens=(224 // patch) ** 2 + 1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1))[:, 0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": ResNet50,
    "vit_b16": functools.partial(ViT16, depth=12, width=768, heads=12),
}
