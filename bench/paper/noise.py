"""Label noise at an exact rate: symmetric, or asymmetric between classes that are easily confused."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.paper.config import Config
from bench.training import data

# Patrini et al. 2017 for CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog. By the same idea
# for Fashion-MNIST: pullover <-> coat, shirt -> T-shirt, sandal -> sneaker, ankle boot -> sneaker.
CONFUSED = {
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
    "fashion-mnist": {2: 4, 4: 2, 6: 0, 5: 7, 9: 7},
}


def confused(dataset: str, classes: int) -> dict[int, int]:
    """The class that a class is taken for. Other data sets, CIFAR-100 among them: the next class, round the circle."""
    return CONFUSED.get(dataset, {c: (c + 1) % classes for c in range(classes)})


def asymmetric(labels: Tensor, rate: float, seed: int, pairs: dict[int, int]) -> Tensor:
    """Exactly round(rate * n) of the n labels of each class in `pairs` become that of its partner.

    Args:
        labels: [N] int64, left as it is.
        rate: in [0, 1).
        seed: the same seed gives the same noise.
        pairs: class and partner; classes that are not in it keep their labels.
    """
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
    """The labels of a run, [N] int64, with the noise of its configuration."""
    if config.noise == "asymmetric":
        return asymmetric(labels, config.noise_rate, config.seed, confused(config.dataset, classes))
    return data.corrupt_labels(labels, config.noise_rate, config.seed, classes)
