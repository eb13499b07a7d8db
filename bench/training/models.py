"""Residual networks for small images, wide (Zagoruyko and Komodakis, 2016) and plain (He et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STAGE_CHANNELS = (16, 32, 64)


def conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the size of the image, but for its stride; a norm behind it has the bias."""
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)


def widen(x: Tensor, channels: int) -> Tensor:  # [B, C, H, W] -> [B, channels, H, W]
    """Append zero channels: a shortcut to a wider layer without weights."""
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


def initialise(model: nn.Module) -> None:
    """Draw He et al.'s normal weights for convolutions, no bias in the last layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def stages(block: Callable[..., nn.Module], channels: int, widths: Sequence[int], blocks: int) -> nn.Sequential:
    """Return stages of as many blocks, each of its width; the first block of all but the first halves the image."""
    layers: list[nn.Module] = []
    for stage, width in enumerate(widths):
        for number in range(blocks):
            layers.append(block(channels, width, stride=2 if stage and not number else 1))
            channels = width
    return nn.Sequential(*layers)


class Block(nn.Module):
    """y = shortcut(x) + conv(relu(bn(conv(relu(bn(x))))))."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv(channels_in, channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        same_shape = stride == 1 and channels_in == channels
        self.shortcut = None if same_shape else conv(channels_in, channels, 1, stride)

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
        widths = [width * channels for channels in STAGE_CHANNELS]
        self.stem = conv(channels, STAGE_CHANNELS[0], 3, stem_stride)
        self.stages = stages(Block, STAGE_CHANNELS[0], widths, blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        features = F.relu(self.norm(self.stages(self.stem(x))))
        return self.head(features.mean(dim=(2, 3)))


class OptionA(nn.Module):
    """y = relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), with a shortcut without weights."""

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
    """ResNet-(6 n + 2) (He et al., 2016, section 4.2): three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, stem_stride: int = 1, *, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"Invalid {depth=} of a ResNet. Must be 6 n + 2.")
        self.stem = conv(channels, STAGE_CHANNELS[0], 3, stem_stride)
        self.norm = nn.BatchNorm2d(STAGE_CHANNELS[0])
        self.stages = stages(OptionA, STAGE_CHANNELS[0], STAGE_CHANNELS, blocks)
        self.head = nn.Linear(STAGE_CHANNELS[-1], classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.head(self.stages(F.relu(self.norm(self.stem(x)))).mean(dim=(2, 3)))


def training_mode(model: nn.Module, frozen: bool) -> None:
    """Put a model into training mode; BatchNorm, where it is frozen, normalises by its running statistics even so."""
    model.train()
    for module in model.modules() if frozen else ():
        if isinstance(module, _BatchNorm):
            module.eval()


def parameter_count(model: torch.nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in model.parameters())
