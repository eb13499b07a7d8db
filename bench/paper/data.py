"""The data of the study by name, label noise, augmentation and Mixup, and what one run sees of them.

The paper's three augmentations of small images (section 3.1), and another:

basic           shift and flip, which `bench.training.data.Batches` does
brightness      of the Keras report: shift, and a random brightness, without a flip
cutout          basic, then a square of zeros (DeVries and Taylor, 2017)
autoaugment     the policy found for CIFAR-10, basic, then cutout (Cubuk et al., 2019, section 4.1); for SVHN the policy
                found for it, then cutout, as in the paper and its code
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import records
from bench.paper.config import Config
from bench.training import data

AUGMENTATIONS = ("none", "basic", "cutout", "autoaugment", "brightness")
# Of torchvision: the reader, the parts to train on, the part to test on, classes, and the folder for a download.
VISION = {
    "cifar10": ("CIFAR10", [{"train": True}], {"train": False}, 10, "cifar"),
    "cifar100": ("CIFAR100", [{"train": True}], {"train": False}, 100, "cifar"),
    "svhn": ("SVHN", [{"split": "train"}, {"split": "extra"}], {"split": "test"}, 10, "svhn"),  # all there is: B.1
}
# Patrini et al. 2017 for CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog. By the same idea
# for Fashion-MNIST: pullover <-> coat, shirt -> T-shirt, sandal -> sneaker, ankle boot -> sneaker.
CONFUSED = {
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
    "fashion-mnist": {2: 4, 4: 2, 6: 0, 5: 7, 9: 7},
}

Change = Callable[[Tensor, torch.Generator], Tensor]


class Split(NamedTuple):
    """Holds the images of one run."""

    train: data.Images
    test: data.Images  # what `test_error` is of
    unseen: data.Images  # the data set's own test images
    true_labels: Tensor  # [N] int64, of `train`: without the noise
    flip: bool
    classes: int


def load(name: str, data_dir: Path | None = None, say: Callable[[str], None] = print) -> data.Dataset:
    """Return a data set, with its name in lower case."""
    if name == "digits":
        return data.load_digits()
    if name == "fashion-mnist":
        found = data.load(data_dir, say)
        return found._replace(name=found.name.lower())
    return load_vision(name, data_dir)


def split(dataset: data.Dataset, config: Config) -> Split:
    """Return the training subset with the noise in its labels, and the test set.

    With `validation`, the last part of the subset, its labels clean, is the test set and not trained on.
    """
    chosen = data.subset(dataset.train, config.train_size, config.seed)
    unseen = data.subset(dataset.test, config.test_size, seed=0) if config.test_size else dataset.test
    test = unseen
    if config.validation:
        kept = len(chosen.labels) - round(config.validation * len(chosen.labels))
        test = data.Images(*(part[kept:] for part in chosen))
        chosen = data.Images(*(part[:kept] for part in chosen))
    labels = corrupted(chosen.labels, config, dataset.classes)
    flip = dataset.flip and moves(config) and config.augment != "brightness"
    return Split(chosen._replace(labels=labels), test, unseen, chosen.labels, flip, dataset.classes)


def load_vision(name: str, folder: Path | None = None) -> data.Dataset:
    """Read both parts of a data set of small colour images; all may be mirrored, which the paper does with SVHN too.

    Args:
        name: one of VISION.
        folder: has the published files, for CIFAR in the folder of their archive; it is used or refused. Without one
            they are downloaded, once.
    """
    if name not in VISION:
        raise ValueError(f"Invalid dataset={name!r}. Must be one of {', '.join(VISION)}.")
    reader_name, parts, test, classes, own = VISION[name]
    reader = getattr(records.torchvision(f"--dataset {name}").datasets, reader_name)
    root = folder or records.ROOT / "data" / own
    try:
        *train, tested = (_images(reader(root, **part, download=folder is None)) for part in [*parts, test])
    except RuntimeError as error:
        if folder is None:
            raise
        raise FileNotFoundError(f"No {name} with the published files in {folder}.") from error
    trained = data.Images(*(torch.cat(of_parts) for of_parts in zip(*train, strict=True)))
    return data.Dataset(name, str(root), trained, tested, flip=True, classes=classes)


def _images(part: torch.utils.data.Dataset) -> data.Images:
    pixels = torch.from_numpy(part.data)
    if pixels.shape[-1] == 3:  # CIFAR's: [N, 32, 32, 3] -> [N, 3, 32, 32]
        pixels = pixels.permute(0, 3, 1, 2)
    labels = part.targets if hasattr(part, "targets") else part.labels
    return data.Images(pixels.contiguous(), torch.as_tensor(labels, dtype=torch.int64))


def confused(dataset: str, classes: int) -> dict[int, int]:
    """Return the class that each class is taken for; in data sets without such pairs the next one, round the circle."""
    return CONFUSED.get(dataset, {c: (c + 1) % classes for c in range(classes)})


def asymmetric(labels: Tensor, rate: float, seed: int, pairs: dict[int, int]) -> Tensor:
    """Change exactly round(rate * n) of the n labels of each class in `pairs` to that of its partner."""
    if not 0 <= rate < 1:
        raise ValueError(f"Invalid {rate=}. Must be in [0, 1).")
    generator = torch.Generator().manual_seed(seed)
    noisy = labels.clone()
    for source, target in sorted(pairs.items()):
        members = (labels == source).nonzero().squeeze(1)
        chosen = torch.randperm(len(members), generator=generator)[: round(rate * len(members))]
        noisy[members[chosen]] = target
    return noisy


def corrupted(labels: Tensor, config: Config, classes: int) -> Tensor:
    """Return the labels of a run, [N] int64, with the noise of its configuration."""
    if config.noise == "asymmetric":
        return asymmetric(labels, config.noise_rate, config.seed, confused(config.dataset, classes))
    return data.corrupt_labels(labels, config.noise_rate, config.seed, classes)


def mix(
    images: Tensor, labels: Tensor, alpha: float, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every example with another of its batch, all in the same proportion (section 2 of the paper).

        x = a x_i + (1 - a) x_j,  y = a y_i + (1 - a) y_j,  a ~ Beta(alpha, alpha),  j a permutation of i

    Returns:
        The images, and the probabilities [B, classes] float32 of the classes.
    """
    # Beta(alpha, alpha) is the share of one of two equal Gamma variables; torch.distributions takes no generator.
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator)
    share = float(gammas[0] / gammas.sum())
    partner = torch.randperm(len(labels), generator=generator).to(labels.device)
    targets = F.one_hot(labels, classes).float()
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)


def moves(config: Config) -> bool:
    """Return whether images are moved at all: not under the policy for SVHN, as in the released code."""
    return config.augment != "none" and (config.dataset, config.augment) != ("svhn", "autoaugment")


def augmentation(name: str, size: int, dataset: str) -> data.Augmentation:
    """Return what an augmentation does besides shifts and flips."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"Invalid augment={name!r}. Must be one of {', '.join(AUGMENTATIONS)}.")
    if name in ("none", "basic"):
        return data.NOTHING_ELSE
    if name == "brightness":
        return data.Augmentation(before=brightness)
    return data.Augmentation(before=autoaugment(dataset) if name == "autoaugment" else None, after=cutout(size // 2))


def cutout(length: int) -> Change:
    """Return what puts a square of zeros, `length` pixels wide, around a random pixel of each image, partly outside."""

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


def brightness(images: Tensor, generator: torch.Generator) -> Tensor:  # [B, C, H, W] uint8
    """Add to each image a number of up to half of the range, positive or negative; cut off at black and white."""
    added = 255 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
    return (images + added.to(images.device)).clamp(0, 255)


def autoaugment(dataset: str) -> Change:
    """Return torchvision's AutoAugment with the policy for SVHN or for CIFAR-10, drawn for each image."""
    transforms = records.torchvision("--augment autoaugment").transforms.v2
    policies = transforms.AutoAugmentPolicy
    policy = transforms.AutoAugment(policies.SVHN if dataset == "svhn" else policies.CIFAR10)

    def change(images: Tensor, generator: torch.Generator) -> Tensor:  # [B, C, H, W] uint8
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            return torch.stack([policy(image) for image in images])

    return change
