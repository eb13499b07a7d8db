"""The data sets of the study by name, and what one run sees of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bench.paper import cifar, noise
from bench.paper.config import Config
from bench.training import data


class Split(NamedTuple):
    """The images of one run."""

    train: data.Images
    test: data.Images  # what `test_error` is of
    unseen: data.Images  # the data set's own test images
    true_labels: Tensor  # [N] int64, of `train`: without the noise
    flip: bool
    classes: int


def load(name: str, data_dir: Path | None = None, say: Callable[[str], None] = print) -> data.Dataset:
    """A data set, with its name in lower case.

    Raises:
        ValueError: another name, or damaged files.
        OSError, RuntimeError: the files cannot be had.
    """
    if name == "digits":
        return data.load_digits()
    if name == "fashion-mnist":
        found = data.load(data_dir, say)
        return found._replace(name=found.name.lower())
    return cifar.load(name, data_dir)


def split(dataset: data.Dataset, config: Config) -> Split:
    """The training subset with the noise in its labels, and the test set.

    With `validation`, the last part of the subset, its labels clean, is the test set and not trained on.
    """
    chosen = data.subset(dataset.train, config.train_size, config.seed)
    unseen = data.subset(dataset.test, config.test_size, seed=0) if config.test_size else dataset.test
    test = unseen
    if config.validation:
        kept = len(chosen.labels) - round(config.validation * len(chosen.labels))
        test = data.Images(*(part[kept:] for part in chosen))
        chosen = data.Images(*(part[:kept] for part in chosen))
    labels = noise.corrupted(chosen.labels, config, dataset.classes)
    flip = dataset.flip and config.augment != "none"
    return Split(chosen._replace(labels=labels), test, unseen, chosen.labels, flip, dataset.classes)
