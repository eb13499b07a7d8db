"""One training run with SGD or FusedSAM: the step, its clock, the epochs, and what a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_sam
from bench.training import data
from bench.training.models import WideResNet
from fused_sam import backends

PASSES = {"sgd": 1, "sam": 2}
MEASUREMENTS = 20  # of the test error in a run, at most


@dataclass(frozen=True)
class Config:
    """Everything that decides the figures; a checkpoint is continued under the same values only."""

    dataset: str
    train_size: int
    label_noise: float
    blocks: int
    width: int
    stem_stride: int
    shift: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    rho: float
    adaptive: bool
    backend: str
    device: str
    threads: int

    @property
    def name(self) -> str:
        noise = f"-noise{100 * self.label_noise:.0f}" if self.label_noise else ""
        return f"{self.dataset.lower()}{noise}"


def chosen_backend(name: str | None, device: str) -> str:
    """The name of the backend that FusedSAM uses."""
    module = backends.for_device(torch.device(device).type, backends.requested(name))
    return module.__name__.rpartition(".")[2]


def save_whole(state: Any, path: Path) -> None:
    """torch.save, but whenever it ends, by a full disk or a kill, the file is the old one or the new one."""
    aside = path.with_suffix(f".part{os.getpid()}")
    try:
        torch.save(state, aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def cosine(progress: float) -> float:
    """The learning rate's factor after this part of a run, from 1 to 0: (1 + cos(pi * progress)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_of_finite(losses: list[float], where: str) -> float:
    """The mean of the losses of the steps of `where`.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"Training stopped: loss is {loss} in step {step} of {where}. Lower --lr or --rho."
            )
    return statistics.fmean(losses)


class StepClock:
    """Milliseconds a training step spends in the model and in the optimizer; never waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part of the running step."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def read(self, steps: int) -> dict[str, list[float]]:
        """Milliseconds per part and step since the last call, `steps` equal steps ago."""
        if self._cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for position, (name, start, stop) in enumerate(self._spans):
            elapsed = start.elapsed_time(stop) if self._cuda else 1e3 * (stop - start)
            times.setdefault(name, [0.0] * steps)[position * steps // len(self._spans)] += elapsed
        self._spans.clear()
        return times


class Run:
    """One training run: model, optimizer and what was measured so far."""

    def __init__(self, optimizer: str, seed: int, config: Config, train: data.Images, *, flip: bool) -> None:
        self.kind, self.seed, self.config = optimizer, seed, config
        self.device = torch.device(config.device)
        self.epochs = 2 * config.epochs // PASSES[optimizer]
        self.batches = data.Batches(
            train, config.batch_size, shift=config.shift, flip=flip, seed=seed, device=self.device
        )
        torch.manual_seed(seed)
        model = WideResNet(config.blocks, config.width, config.stem_stride)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = self._make_optimizer()
        self.clock = StepClock(self.device)
        self.epoch, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.times: dict[str, list[float]] = {"model": [], "optimizer": []}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        options: dict[str, Any] = {
            "params": self.model.parameters(),
            "lr": config.lr,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "nesterov": config.nesterov,
        }
        if self.kind == "sgd":
            return torch.optim.SGD(**options)
        sam = fused_sam.FusedSAM(**options, rho=config.rho, adaptive=config.adaptive, backend=config.backend)
        fused_sam.batchnorm.first_pass_only(self.model, sam)
        return sam

    @property
    def label(self) -> str:
        """As tables and pictures name the run."""
        if self.kind == "sgd":
            return "SGD"
        return f"{'ASAM' if self.config.adaptive else 'SAM'} rho={self.config.rho:g}"

    @property
    def finished(self) -> bool:
        return self.epoch == self.epochs

    def train_epoch(self, on_step: Callable[[], None]) -> float:
        """One epoch; returns the mean training loss at w."""
        self.model.train()
        losses = []
        for step, (images, labels) in enumerate(self.batches.epoch(self.epoch)):
            progress = (self.epoch + step / len(self.batches)) / self.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * cosine(progress)
            losses.append(train_step(self.model, self.optimizer, images, labels, self.clock))
            on_step()
        for name, milliseconds in self.clock.read(len(losses)).items():
            self.times[name].append(statistics.median(milliseconds))
        self.epoch += 1
        return mean_of_finite(torch.stack(losses).tolist(), f"epoch {self.epoch} of {self.label}, seed {self.seed}")

    def advance(self, test: data.Images, on_step: Callable[[], None]) -> None:
        """Train up to the next measuring point, which lies after as many passes for both runs."""
        start = time.perf_counter()
        interval = math.ceil(self.config.epochs / MEASUREMENTS) * 2 // PASSES[self.kind]
        for _ in range(min(interval, self.epochs - self.epoch)):
            loss = self.train_epoch(on_step)
        error = error_rate(self.model, test, self.batches.mean, self.batches.std)
        self.seconds += time.perf_counter() - start
        passes = self.epoch * PASSES[self.kind]
        self.history.append({"passes": passes, "train_loss": loss, "test_error": error})

    def result(self) -> dict[str, Any]:
        """What the table, the picture and the result rows show."""
        model_ms, optimizer_ms = (statistics.median(self.times[part]) for part in ("model", "optimizer"))
        errors = [point["test_error"] for point in self.history]
        return {
            "optimizer": self.kind,
            "label": self.label,
            "seed": self.seed,
            "run_epochs": self.epochs,
            "steps": self.epochs * len(self.batches),
            "test_error_final": errors[-1],
            "test_error_best": min(errors),
            "step_ms": model_ms + optimizer_ms,
            "optimizer_ms": optimizer_ms,
            "seconds": self.seconds,
            "history": self.history,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs; batches follow from the seed and the epoch."""
        kept = {name: getattr(self, name) for name in ("kind", "seed", "epoch", "seconds", "history", "times")}
        return kept | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("epoch", "seconds", "history", "times"):
            setattr(self, name, state[name])


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,  # [B, 1, 28, 28]
    labels: Tensor,  # [B]
    clock: StepClock,
) -> Tensor:
    """One step of SGD or SAM; returns the loss at w, 0-dim, still on the device."""
    with clock.part("model"):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    if isinstance(optimizer, fused_sam.FusedSAM):
        with clock.part("optimizer"):
            optimizer.first_step(zero_grad=True)
        with clock.part("model"):
            F.cross_entropy(model(images), labels).backward()
    with clock.part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@torch.inference_mode()
def error_rate(model: nn.Module, test: data.Images, mean: Tensor, std: Tensor, batch_size: int = 500) -> float:
    """Percentage of the test images that are put into a wrong class."""
    model.eval()
    device = next(model.parameters()).device
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in zip(test.images.split(batch_size), test.labels.split(batch_size), strict=True):
        predicted = model(data.normalise(images.to(device), mean, std)).argmax(dim=1)
        wrong += (predicted != labels.to(device)).sum()
    return 100 * int(wrong) / len(test.labels)
