"""Image files in batches for each rank; random images to measure throughput with.

Order and augmentation follow from the seed, the epoch and the number of the image alone: not from the number of worker
processes, nor from where a run was interrupted.
"""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bench.imagenet.ranks import Ranks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, scaled to [0, 1]
CLASSES = 1000

Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W] uint8, labels [B] int64


class Synthetic:
    """Random images that are on the device, the same in all micro-batches; arguments as those of `Files`."""

    def __init__(self, image_size: int, batch_size: int, micro_batches: int, steps: int, ranks: Ranks) -> None:
        self.classes, self.steps, self.images = CLASSES, steps, batch_size
        count = batch_size // (ranks.size * micro_batches)
        generator = torch.Generator().manual_seed(ranks.rank)
        images = torch.randint(256, (count, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        self._parts = [_on_device((images, labels), ranks.device)] * micro_batches

    def training(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step."""
        for _ in range(start, self.steps):
            yield self._parts


class Files:
    """A data set of image files, in batches for each rank.

    Args:
        training: images to train on, with their classes.
        validation: those to evaluate.
        classes: how many there are.
        batch_size: images of a step, over all ranks. The last, incomplete batch of an epoch is dropped.
        micro_batches: parts in which a rank gets its images of a step; so many are also evaluated together.
        ranks: among which the images are divided.
        seed: of the order and of the augmentation.
        workers: processes that read images, for each rank.
    """

    def __init__(
        self,
        training: Any,
        validation: Any,
        classes: int,
        batch_size: int,
        micro_batches: int,
        ranks: Ranks,
        seed: int,
        workers: int,
    ) -> None:
        if len(training) < batch_size:
            raise ValueError(f"Invalid {batch_size=}. Must be <= {len(training)}, the images to train on.")
        self.classes, self.images, self.steps = classes, len(training), len(training) // batch_size
        self._device, self._micro_batches = ranks.device, micro_batches
        self._order = MicroBatches(len(training), batch_size, micro_batches, ranks, seed)
        at_once = batch_size // (ranks.size * micro_batches)
        mine = range(ranks.rank, len(validation), ranks.size)  # nothing is counted twice, so that ranks may have fewer
        options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": ranks.device.type == "cuda",
            "persistent_workers": workers > 0,
            "worker_init_fn": _ignore_interrupts,
            # Otherwise each epoch, begun or taken up again, takes a number from the generator of the model's dropout.
            "generator": torch.Generator(),
        }
        self._training = DataLoader(Augmented(training, seed), batch_sampler=self._order, **options)
        self._validation = DataLoader(validation, batch_size=at_once, sampler=mine, **options)

    def training(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step of an epoch, from the step ``start`` on."""
        self._order.epoch, self._order.start = epoch, start
        parts = []
        for part in self._training:
            parts.append(_on_device(part, self._device))
            if len(parts) == self._micro_batches:
                yield parts
                parts = []

    def validation(self) -> Iterator[Batch]:
        """Yield what this rank evaluates."""
        for batch in self._validation:
            yield _on_device(batch, self._device)


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """(epoch, image) pairs of each micro-batch of a rank; set ``epoch`` and the step to ``start`` with before use."""

    def __init__(self, images: int, batch_size: int, micro_batches: int, ranks: Ranks, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.shares, self.micro_batches = ranks.rank, ranks.size * micro_batches, micro_batches
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.images // self.batch_size - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator)
        for step in range(self.start, self.images // self.batch_size):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            for part in batch.chunk(self.shares)[self.rank * self.micro_batches :][: self.micro_batches]:
                yield [(self.epoch, i) for i in part.tolist()]


class Augmented(Dataset[Batch]):
    """The images of a training set, each with random numbers of its own in each epoch."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mixed(self.seed, epoch, index))
            return self.images[index]


class Normalise:
    """[B, 3, H, W] uint8 to float32 of mean 0 and variance 1, in the same memory format."""

    def __init__(self, device: torch.device) -> None:
        # Once: a copy from the host in every pass would wait for the device.
        self._mean, self._std = (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean) / self._std


def _on_device(batch: Batch, device: torch.device) -> Batch:
    images, labels = (x.to(device, non_blocking=True) for x in batch)
    return images.contiguous(memory_format=torch.channels_last), labels


def _mixed(*numbers: int) -> int:
    return zlib.crc32(" ".join(map(str, numbers)).encode())


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the workers too: they are to go on until the step has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
