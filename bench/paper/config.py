"""What decides the figures of one training run, and its name in the result rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

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
    lr: float  # at first; a cosine takes it to 0
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
    micro_batch: int | None = None  # examples that share an e: the m of m-sharpness
    freeze_batchnorm: bool = False  # normalise by the running statistics, and leave them alone
    measurements: int = 1  # points of the history, the last one at the end
    extra: dict[str, Any] = field(default_factory=dict)  # what only one experiment knows

    def __post_init__(self) -> None:
        for name in ("train_size", "epochs", "batch_size", "measurements"):
            if getattr(self, name) < 1:
                raise ValueError(f"Invalid {name}={getattr(self, name)}. Must be >= 1.")
        for name in ("shift", "test_size", "mixup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"Invalid {name}={getattr(self, name)}. Must be >= 0.")
        for name in ("validation", "noise_rate", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Invalid {name}={getattr(self, name)}. Must be in [0, 1).")
        if self.ascent is not None and not 0 < self.ascent <= 1:
            raise ValueError(f"Invalid ascent={self.ascent}. Must be in (0, 1].")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise ValueError(f"Invalid micro_batch={self.micro_batch}. Must be in [1, {self.batch_size}], the batch.")
        if self.noise not in NOISES:
            raise ValueError(f"Invalid noise={self.noise!r}. Must be one of {', '.join(NOISES)}.")

    @property
    def key(self) -> str:
        """Twelve hex digits that name the run: equal for equal values."""
        text = json.dumps({n: v for n, v in asdict(self).items() if v != _unused(n)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _unused(name: str) -> Any:
    found = next(f for f in fields(Config) if f.name == name)
    return found.default_factory() if found.default_factory is not MISSING else found.default
