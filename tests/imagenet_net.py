"""A trainer of bench.imagenet with a net of float64 weights and one batch, in this process or on a rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from bench.imagenet import __main__ as imagenet
from bench.imagenet import config as imagenet_config
from bench.imagenet import data as imagenet_data
from bench.imagenet import trainer as imagenet_training
from bench.imagenet.ranks import Ranks

CPU = torch.device("cpu")
BATCH, CLASSES, SIZE, STEPS = 12, 3, 4, 2
FLAGS = ["--synthetic", "--image-size", str(SIZE), "--device", "cpu", "--rho", "0.7", "--lr", "0.3"]


class Net(nn.Module):
    """Not linear."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Flatten(), nn.Linear(3 * SIZE**2, 7), nn.Tanh(), nn.Linear(7, CLASSES)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.double())


def make_net(config: imagenet_config.Config) -> Net:
    return Net()


def config(ranks: int = 1, **options: Any) -> imagenet_config.Config:
    flags = vars(imagenet.parse_args(FLAGS)) | {"batch_size": BATCH, "backend": "native"} | options
    return imagenet_config.Config.of(flags, classes=CLASSES, train_images=BATCH, ranks=ranks)


def batch() -> imagenet_data.Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def make_trainer(ranks: Ranks, scaled: bool = False, **options: Any) -> imagenet_training.Trainer:
    """``scaled``: as with fp16, but in full precision; the scale is a power of two."""
    with mock.patch.object(imagenet_training, "make_model", make_net):
        data = imagenet_data.Synthetic(SIZE, BATCH, options.get("micro_batches", 1), STEPS, ranks)
        trainer = imagenet_training.Trainer(config(ranks.size, **options), ranks, data, log_every=1)
    if scaled:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    return trainer


def train(trainer: imagenet_training.Trainer) -> tuple[list[torch.Tensor], float]:
    """The weights after the steps, and the mean of the losses."""
    count = trainer.config.micro_batches
    parts = list(zip(*(x.chunk(trainer.ranks.size * count) for x in batch())))
    parts = parts[trainer.ranks.rank * count :][:count]
    for trainer.step in range(STEPS):
        trainer.train_step(parts)
    trainer.step = STEPS
    return [p.detach() for p in trainer.model.parameters()], trainer.look()["loss"]


def train_on_this_rank(**options: Any) -> tuple[list[torch.Tensor], float]:
    """`train` as one of the ranks of the group there is."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), CPU, dist.group.WORLD)
    return train(make_trainer(ranks, **options))
