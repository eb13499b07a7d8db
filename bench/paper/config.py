"""What decides the figures of one training run, and its name in the result rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from bench.training.run import check

NOISES = ("symmetric", "asymmetric")


@dataclass(frozen=True)
class Config:
    """One run. Values are plain JSON, so that a row holds all of them.

    A field that is at its default here says "not used": it does not count in `key`, so that rows stay valid when the
    study learns something new. Sizes are in images, lengths in epochs.
    """

    dataset: str
    train_size: int
    model: str
    augment: str
    shift: int  # pixels, of the random shift
    epochs: int
    batch_size: int
    lr: float  # at first; a cosine takes it to 0, or see `plateau`
    momentum: float
    weight_decay: float
    device: str
    seed: int = 0  # of the subset, the noise, the initial weights, the order and the augmentation
    nesterov: bool = False
    label_smoothing: float = 0.0
    test_size: int = 0  # images of the test set, the same for all runs; 0 for all of them
    validation: float = 0.0  # this part of the training images is held out and takes the place of the test set
    noise: str = "symmetric"
    noise_rate: float = 0.0
    mixup: float = 0.0  # alpha
    bootstrap: bool = False
    optimizer: str = "sgd"  # a name in methods.STEPPERS
    options: dict[str, Any] = field(default_factory=dict)  # of the optimizer: rho, p, interval, ...
    ascent: float | None = None  # the part of each batch that e is made from
    micro_batch: int | None = None  # examples that share a perturbation, the m of m-sharpness; SGD adds up the parts
    plateau: int = 0  # epochs in a row without a lower test loss that halve the rate; 0 for the cosine
    clip: float = 0.0  # largest norm of the gradient that the base step gets; 0 for any
    decay_in_loss: bool = False  # the L2 term is part of the loss, and of both gradients, not of the base step
    reflect: bool = False  # beyond the border an image is its mirror, and not black
    uniform_head: bool = False  # first weights of the last layer from U(-1, 1) / sqrt(classes)
    true_gradient: bool = True  # Shake-Shake and ShakeDrop have the shares of the forward in SAM's first gradient
    mask_per_image: bool = True  # ShakeDrop drops a branch for some images, and not for all of a batch
    rounded_widths: bool = True  # of a PyramidNet's blocks; published ones are rounded down
    freeze_batchnorm: bool = False  # normalise by the running statistics, and leave them alone
    measurements: int = 1  # points of the history, the last one at the end
    extra: dict[str, Any] = field(default_factory=dict)  # what only one experiment knows

    def __post_init__(self) -> None:
        check(self, ">= 1", lambda x: x >= 1, "train_size", "epochs", "batch_size", "measurements")
        check(self, ">= 0", lambda x: x >= 0, "shift", "test_size", "mixup", "weight_decay", "clip", "plateau")
        check(self, "in [0, 1)", lambda x: 0 <= x < 1, "validation", "noise_rate", "label_smoothing")
        check(self, "in (0, 1]", lambda x: 0 < x <= 1, "ascent")
        check(self, f"in [1, {self.batch_size}], the batch", lambda x: 1 <= x <= self.batch_size, "micro_batch")
        check(self, f"one of {', '.join(NOISES)}", lambda x: x in NOISES, "noise")
        if self.micro_batch is not None and self.ascent is not None:
            raise ValueError(f"Invalid micro_batch={self.micro_batch} with ascent={self.ascent}. Must be one of them.")

    @property
    def key(self) -> str:
        """Return twelve hex digits that name the run: equal for equal values."""
        text = json.dumps(used(asdict(self)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def used(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not at its default: rows of before a field came to be lack it."""
    return {name: value for name, value in config.items() if value != _unused(name)}


def _unused(name: str) -> Any:
    found = next(f for f in fields(Config) if f.name == name)
    return found.default_factory() if found.default_factory is not MISSING else found.default
