"""One run of the study: from a configuration to what its row says, with a checkpoint on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper import methods, models
from bench.paper.config import Config
from bench.paper.data import Split, augmentation, mix, moves, split
from bench.records import Row
from bench.training import checkpoint, data
from bench.training.models import training_mode
from bench.training.run import cosine, mean_of_finite

CHECKPOINT_SECONDS = 60.0
COUNTS = ("epoch", "seconds", "passes", "history", "test_losses")
Observer = Callable[["Training"], Row]
LOWER = 1e-4  # a loss that is lower by less does not count as lower, as in Keras


def new_model(config: Config, images: Split) -> nn.Module:
    """Return a run's network with its first weights, which follow from the seed."""
    torch.manual_seed(config.seed)
    channels, size = data.channelled(images.train.images[:1]).shape[1:3]
    details = models.Details(*(getattr(config, name) for name in models.Details._fields))
    return models.make(config.model, channels=channels, classes=images.classes, size=size, details=details)


def plateaus(losses: Sequence[float], patience: int) -> float:
    """Return the rate's factor, which `patience` losses in a row above the lowest halve: Keras's ReduceLROnPlateau."""
    factor, lowest, waited = 1.0, float("inf"), 0
    for loss in losses:
        lowest, waited = (loss, 0) if loss < lowest - LOWER else (lowest, waited + 1)
        if waited == patience:
            factor, waited = factor / 2, 0
    return factor


class Training:
    """One model, its optimizer and what was measured so far.

    Args:
        config: of the run.
        images: what it is trained and tested on.
        weights: of the model at first; None for random ones.
        make_stepper: what makes the steps.
    """

    def __init__(
        self,
        config: Config,
        images: Split,
        weights: dict[str, Tensor] | None = None,
        make_stepper: methods.Factory = methods.make,
    ) -> None:
        self.config, self.images, self.device = config, images, torch.device(config.device)
        self.batches = data.Batches(
            images.train,
            config.batch_size,
            shift=config.shift if moves(config) else 0,
            flip=images.flip,
            seed=config.seed,
            device=self.device,
            reflect=config.reflect,
            augmentation=augmentation(config.augment, images.train.images.shape[-1], config.dataset),
        )
        model = new_model(config, images)
        if weights is not None:
            model.load_state_dict(weights)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.stepper = make_stepper(self.model, config)
        self.epoch, self.seconds, self.passes = 0, 0.0, 0.0
        self.history: list[Row] = []
        self.test_losses: list[float] = []  # of each epoch, where the rate follows from them

    @property
    def finished(self) -> bool:
        return self.epoch == self.config.epochs

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.stepper.optimizer

    def inputs(self, images: Tensor) -> Tensor:
        """Return [B, H, W] or [B, C, H, W] uint8 as the model sees them when it is tested."""
        return data.normalise(images.to(self.device), self.batches.mean, self.batches.std)

    def loss_of(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy; targets are classes, or their probabilities."""
        return F.cross_entropy(self.model(images), targets, label_smoothing=self.config.label_smoothing)

    def train_epoch(self) -> float:
        """Train an epoch; return the mean training loss."""
        training_mode(self.model, self.config.freeze_batchnorm)
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.epoch)
        halved = plateaus(self.test_losses, self.config.plateau) if self.config.plateau else 0.0
        start, losses = self._clock(), []
        for step, (images, targets) in enumerate(self.batches.epoch(self.epoch)):
            progress = (self.epoch + step / len(self.batches)) / self.config.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (halved or cosine(progress))
            if self.config.mixup:
                images, targets = mix(images, targets, self.config.mixup, self.images.classes, generator)
            loss, passes = self.stepper.step(self.loss_of, images, targets)
            self.passes += passes / len(self.batches)
            losses.append(loss)
        values = torch.stack(losses).tolist()
        self.optimizer.zero_grad()
        self.seconds += self._clock() - start
        self.epoch += 1
        return mean_of_finite(values, self.epoch)

    def _clock(self) -> float:
        """Return seconds: of the processor on a CPU, where other jobs do not count; of the wall on a device."""
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def advance(self, observe: Observer | None = None) -> None:
        """Train an epoch, and add a point of the history where one is due."""
        loss = self.train_epoch()
        if self.config.plateau:
            self.test_losses.append(self.evaluate(self.images.test)[1])
        points, epochs = min(self.config.measurements, self.config.epochs), self.config.epochs
        if self.epoch * points // epochs > (self.epoch - 1) * points // epochs:
            point = {"epoch": self.epoch, "passes": round(self.passes, 3), "seconds": round(self.seconds, 3)}
            point |= {"train_loss": loss, "test_error": self.evaluate(self.images.test)[0]}
            self.history.append(point | (observe(self) if observe else {}))

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Return those of the model in evaluation mode, [N, classes]."""
        self.model.eval()
        return torch.cat([self.model(self.inputs(part)) for part in images.split(batch_size)])

    def evaluate(self, images: data.Images) -> tuple[float, float]:
        """Return the percentage of images in a wrong class, and their mean loss; without augmentation."""
        logits, labels = self.logits(images.images), images.labels.to(self.device)
        wrong = int((logits.argmax(dim=1) != labels).sum())
        return 100 * wrong / len(labels), float(F.cross_entropy(logits, labels))

    def examples(self, count: int, part: str = "train") -> tuple[Tensor, Tensor]:
        """Return the first images of "train", "test" or "unseen" as the model sees them, and their labels as given."""
        images, labels = getattr(self.images, part)
        return self.inputs(images[:count]), labels[:count].to(self.device)

    def result(self) -> Row:
        """Return what every row says of a finished run; training figures: of labels as given, without augmentation."""
        error, loss = self.evaluate(self.images.train)
        return {
            "test_error": self.history[-1]["test_error"],
            "train_error": error,
            "train_loss": loss,
            "seconds": round(self.seconds, 3),
            "passes": round(self.passes, 3),
            "history": self.history,
        }

    def state_dict(self) -> Row:
        """Return everything a continued run needs; batches follow from the seed and the epoch."""
        return checkpoint.state_of(self, COUNTS) | {"random": checkpoint.random_state(self.device)}

    def load_state_dict(self, state: Row) -> None:
        checkpoint.restore(self, state, COUNTS)
        checkpoint.set_random_state(state["random"], self.device)


@dataclass
class Context:
    """What runs of one command share."""

    dataset: data.Dataset
    folder: Path  # of checkpoints
    on_epoch: Callable[[Config, int], None] = lambda config, epoch: None
    observe: Observer | None = None  # at the end of a run; its values enter the row
    observe_during: Observer | None = None  # at each point of the history, which they enter

    def split(self, config: Config) -> Split:
        """Return the images of a run."""
        return split(self.dataset, config)


def train(
    config: Config, context: Context, *, images: Split | None = None, weights: dict[str, Tensor] | None = None
) -> Training:
    """Return a finished run; one that was interrupted goes on from its checkpoint, to the same bits."""
    training = Training(config, images or context.split(config), weights)
    path = context.folder / f"{config.key}.pt"
    if path.is_file():
        training.load_state_dict(checkpoint.load(path, asdict(config)))
    saved = time.monotonic()
    while not training.finished:
        training.advance(context.observe_during)
        context.on_epoch(config, training.epoch)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint.save(training.state_dict(), path)
            saved = time.monotonic()
    path.unlink(missing_ok=True)
    return training


def execute(config: Config, context: Context) -> Row:
    """Train, and return what came out."""
    training = train(config, context)
    return training.result() | (context.observe(training) if context.observe else {})
