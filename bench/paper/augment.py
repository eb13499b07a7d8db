"""The paper's three augmentations of small images (section 3.1), for batches.

basic           shift and flip, which `bench.training.data.Batches` does
cutout          basic, then a square of zeros (DeVries and Taylor, 2017)
autoaugment     the policy found for CIFAR-10, basic, then cutout (Cubuk et al., 2019, section 4.1)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import records
from bench.training.data import NOTHING_ELSE, Augmentation

NAMES = ("none", "basic", "cutout", "autoaugment")

Change = Callable[[Tensor, torch.Generator], Tensor]


def make(name: str, size: int) -> Augmentation:
    """What an augmentation does besides shifts and flips.

    Args:
        name: of `NAMES`.
        size: height and width of the images; cutout's square has half of it, 16 pixels of CIFAR's 32.

    Raises:
        ValueError: another name.
        RuntimeError: no torchvision for "autoaugment".
    """
    if name not in NAMES:
        raise ValueError(f"Invalid augment={name!r}. Must be one of {', '.join(NAMES)}.")
    if name in ("none", "basic"):
        return NOTHING_ELSE
    return Augmentation(before=autoaugment() if name == "autoaugment" else None, after=cutout(size // 2))


def cutout(length: int) -> Change:
    """A square of zeros, `length` pixels wide, around a random pixel of each image; it may lie partly outside."""

    def change(images: Tensor, generator: torch.Generator) -> Tensor:  # [B, C, H, W] float32, mean 0
        covered = torch.ones(len(images), 1, 1, 1, dtype=torch.bool)
        for dim in (2, 3):
            size = images.shape[dim]
            start = torch.randint(size, (len(images), 1), generator=generator) - length // 2
            pixel = torch.arange(size)
            inside = (pixel >= start) & (pixel < start + length)  # [B, size]
            covered = covered & inside.unflatten(1, (1, size, 1) if dim == 2 else (1, 1, size))
        return images.masked_fill(covered.to(images.device), 0)

    return change


def autoaugment() -> Change:
    """torchvision's AutoAugment with the policy for CIFAR-10, drawn for each image."""
    transforms = records.torchvision("--augment autoaugment").transforms.v2
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)

    def change(images: Tensor, generator: torch.Generator) -> Tensor:  # [B, C, H, W] uint8
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            return torch.stack([policy(image) for image in images])

    return change
