"""Parameter shapes of vision models, in the order of `model.parameters()`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from bench.speed.models import MODELS, ViT16
from bench.training.models import WideResNet

Shape = tuple[int, ...]


def _shapes_of(make: Callable[[], nn.Module]) -> list[Shape]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in make().parameters()]


def resnet20() -> list[Shape]:
    """Return those of ResNet-20 for CIFAR-10 (He et al., 2016) with projections in its shortcuts."""

    def conv_norm(channels_in: int, channels: int, kernel: int) -> list[Shape]:
        return [(channels, channels_in, kernel, kernel), (channels,), (channels,)]

    shapes = conv_norm(3, 16, 3)
    channels = 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += conv_norm(channels, width, 3) + conv_norm(width, width, 3)
            if channels != width:
                shapes += conv_norm(channels, width, 1)
            channels = width
    return [*shapes, (10, channels), (10,)]


# ViT-L/16 would take a CPU seconds a step.
GPU_SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": functools.partial(_shapes_of, MODELS["resnet50"]),
    "wrn28_10": functools.partial(_shapes_of, lambda: WideResNet(blocks=4, width=10, channels=3)),
    "vit_b16": functools.partial(_shapes_of, MODELS["vit_b16"]),
    "vit_l16": functools.partial(_shapes_of, lambda: ViT16(depth=24, width=1024, heads=16)),
    "resnet20": resnet20,
}
SETS = {name: make for name, make in GPU_SETS.items() if name != "vit_l16"}
TITLES = {
    "resnet50": "ResNet-50",
    "wrn28_10": "WRN-28-10",
    "vit_b16": "ViT-B/16",
    "vit_l16": "ViT-L/16",
    "resnet20": "ResNet-20",
}

# How many tensors of one element the host's work is measured on: those of models, and many small ones.
HOST_SETS = {"resnet20": 65, "resnet50": 161, "vit_b16": 152, "1000": 1_000, "10000": 10_000}


def host_set(tensors: int) -> str:
    """Return the name that rows have for such a set."""
    return f"{tensors} x 1"


def parameter_count(shapes: list[Shape]) -> int:
    """Return the number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)
