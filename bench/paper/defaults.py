"""The size of a run where nothing else is said: small enough for two CPU cores. All experiments share it.

One run of SGD takes seven to eight seconds of one core, one of SAM twice as many, and the net has the room to learn
wrong labels by heart in that time.
"""

from __future__ import annotations

from typing import Any

SEEDS = (0, 1, 2)

# Fashion-MNIST, and digits where it cannot be had.
SMALL: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "train_size": 1_000,
    "model": "small",
    "augment": "basic",
    "shift": 1,
    "epochs": 30,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
}

# What a data set of colour images changes in it: all of the data, and the paper's padding by four pixels.
CIFAR: dict[str, Any] = {"train_size": 50_000, "model": "wrn-28-10", "shift": 4, "epochs": 200, "batch_size": 256}
DATASETS: dict[str, dict[str, Any]] = {"fashion-mnist": {}, "digits": {}, "cifar10": CIFAR, "cifar100": CIFAR}

RHO = 0.05
