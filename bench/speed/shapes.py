"""Parameter shapes of vision models, in the order of `model.parameters()`: sizes without the models."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]


def _conv(channels_in: int, channels: int, kernel: int) -> list[Shape]:
    return [(channels, channels_in, kernel, kernel)]


def _norm(channels: int) -> list[Shape]:
    return [(channels,), (channels,)]


def _linear(features_in: int, features: int) -> list[Shape]:
    return [(features, features_in), (features,)]


def _conv_norm(channels_in: int, channels: int, kernel: int) -> list[Shape]:
    return _conv(channels_in, channels, kernel) + _norm(channels)


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet (He et al., 2016): 161 tensors, 25 557 032 parameters."""
    shapes = _conv_norm(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_norm(channels, width, 1) + _conv_norm(width, width, 3) + _conv_norm(width, 4 * width, 1)
            if block == 0:
                shapes += _conv_norm(channels, 4 * width, 1)
            channels = 4 * width
    return shapes + _linear(channels, 1000)


def wrn28_10() -> list[Shape]:
    """WRN-28-10 for CIFAR-10 (Zagoruyko and Komodakis, 2016): 80 tensors, 36 479 194 parameters."""
    shapes = _conv(3, 16, 3)
    channels = 16
    for width in (160, 320, 640):
        for block in range(4):
            shapes += _norm(channels) + _conv(channels, width, 3) + _norm(width) + _conv(width, width, 3)
            if block == 0:
                shapes += _conv(channels, width, 1)
            channels = width
    return shapes + _norm(channels) + _linear(channels, 10)


def _vit(depth: int, width: int, patch: int) -> list[Shape]:
    """At 224 x 224 for ImageNet, as in torchvision."""
    patches = (224 // patch) ** 2
    shapes: list[Shape] = [(1, 1, width), *_conv(3, width, patch), (width,), (1, patches + 1, width)]
    for _ in range(depth):
        attention = _linear(width, 3 * width) + _linear(width, width)
        mlp = _linear(width, 4 * width) + _linear(4 * width, width)
        shapes += _norm(width) + attention + _norm(width) + mlp
    return shapes + _norm(width) + _linear(width, 1000)


def vit_b16() -> list[Shape]:
    """ViT-B/16 (Dosovitskiy et al., 2021): 152 tensors, 86 567 656 parameters."""
    return _vit(depth=12, width=768, patch=16)


def vit_l16() -> list[Shape]:
    """ViT-L/16 (Dosovitskiy et al., 2021): 296 tensors, 304 326 632 parameters."""
    return _vit(depth=24, width=1024, patch=16)


def resnet20() -> list[Shape]:
    """ResNet-20 for CIFAR-10 (He et al., 2016) with projection shortcuts: 65 tensors, 272 474 parameters."""
    shapes = _conv_norm(3, 16, 3)
    channels = 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += _conv_norm(channels, width, 3) + _conv_norm(width, width, 3)
            if channels != width:
                shapes += _conv_norm(channels, width, 1)
            channels = width
    return shapes + _linear(channels, 10)


SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "wrn28_10": wrn28_10,
    "vit_b16": vit_b16,
    "resnet20": resnet20,
}
# ViT-L/16 would take a CPU seconds a step.
GPU_SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "wrn28_10": wrn28_10,
    "vit_b16": vit_b16,
    "vit_l16": vit_l16,
    "resnet20": resnet20,
}
TITLES = {
    "resnet50": "ResNet-50",
    "wrn28_10": "WRN-28-10",
    "vit_b16": "ViT-B/16",
    "vit_l16": "ViT-L/16",
    "resnet20": "ResNet-20",
}


def parameter_count(shapes: list[Shape]) -> int:
    """Number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
