"""Training and evaluation of one model: the step, the epochs, and what a checkpoint holds."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_sam
from bench.imagenet.config import DTYPES, Config, make_model, make_optimizer
from bench.imagenet.data import Batch, Files, Normalise, Synthetic
from bench.imagenet.progress import Reporter
from bench.imagenet.ranks import Ranks
from bench.imagenet.signals import Interrupted, Requests
from bench.training import checkpoint
from bench.training.models import training_mode
from bench.training.run import StepClock, mean_of_finite
from fused_sam import rng

CHECKPOINT = "checkpoint.pt"
COUNTS = ("epoch", "step", "loss_sum", "seconds", "history")


class Trainer:
    """Model, optimizer and what was measured so far, on one rank.

    Args:
        config: the same on all ranks.
        ranks: of this process.
        data: what this rank trains with.
        log_every: steps between two looks at the losses, for which the host waits for the device.
        evaluate_every: epochs between two evaluations with a checkpoint each.
    """

    def __init__(
        self, config: Config, ranks: Ranks, data: Files | Synthetic, log_every: int, evaluate_every: int = 1
    ) -> None:
        self.config, self.ranks, self.data = config, ranks, data
        self.log_every, self.evaluate_every = log_every, evaluate_every
        torch.manual_seed(config.seed)
        self.model = make_model(config).to(ranks.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(config, self.model)
        self.average = None if config.ema is None else _average(self.model, config.ema)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.parallel = _parallel(self.model, self.optimizer, config, ranks)
        self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.normalise = Normalise(ranks.device)
        self.clock = StepClock(ranks.device)
        torch.manual_seed(config.seed + 1 + ranks.rank)  # dropout: other masks on each rank
        self.epoch = self.step = 0  # of the epoch
        self.loss_sum, self.seconds = 0.0, 0.0
        self.history: list[dict[str, Any]] = []
        self._pending: list[Tensor] = []  # losses not read yet, still on the device
        self._looked = time.perf_counter()

    @property
    def steps_made(self) -> int:
        """Return how many, since the run began."""
        return self.epoch * self.data.steps + self.step

    def run(self, out: Path, reporter: Reporter, requests: Requests) -> None:
        """Train the epochs that are left, with an evaluation and a checkpoint after some of them and the last one.

        A signal stops the run, saved, at the end of the step, or of the evaluation if that was not the last one.
        """
        self._looked = time.perf_counter()
        while self.epoch < self.config.epochs:
            self._stop_if_asked(requests, out)
            self.train_epoch(out, reporter, requests)
            due = (self.epoch + 1) % self.evaluate_every == 0 or self.epoch + 1 == self.config.epochs
            if due:
                self.save(out)  # evaluation takes a while
                self.history.append(self._point())
            self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
            if due:
                self.save(out)
                reporter.epoch(self.history[-1], self.steps_made)

    def train_epoch(self, out: Path, reporter: Reporter, requests: Requests) -> None:
        """Make the steps of the present epoch that are left."""
        training_mode(self.model, self.config.freeze_batchnorm)
        for parts in self.data.training(self.epoch, self.step):
            self.train_step(parts)
            self.step += 1
            reporter.advance()
            if self.step % self.log_every == 0 or self.step == self.data.steps:
                reporter.interval(self.look(), self.steps_made)
            self._stop_if_asked(requests, out)

    def train_step(self, parts: list[Batch]) -> None:
        """Make one step with this rank's micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.epoch + self.step / self.data.steps)
        closures = isinstance(self.optimizer, fused_sam.FusedSAM) and not self.scaler.is_enabled()
        with self.clock.part("step"):
            loss = self._step_by_closures(parts) if closures else self._step_by_calls(parts)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._pending.append(loss)

    def _step_by_closures(self, parts: list[Batch]) -> Tensor:
        """Make a step with one closure for each group of parts that share a perturbation."""
        groups = [[part] for part in parts] if self.config.m_sharpness == "micro" else [parts]
        whole = [functools.partial(self._gradient, group) for group in groups]
        if self.config.ascent_part == 1:
            return self.optimizer.step(whole)
        firsts = [functools.partial(self._gradient, self._firsts(group)) for group in groups]
        return self.optimizer.step(whole, ascent=firsts)

    def _step_by_calls(self, parts: list[Batch]) -> Tensor:
        """Make a step of SGD, or of SAM under a GradScaler."""
        loss = None
        if isinstance(self.optimizer, fused_sam.FusedSAM) and self.optimizer.perturb_next:
            random_state = rng.capture([self.ranks.device])
            if self.optimizer.direction == "gradient":
                loss = self._gradient(self._firsts(parts))
            self.optimizer.first_step(zero_grad=True)
            rng.replay(random_state)
        second = self._gradient(parts)
        if not isinstance(self.optimizer, fused_sam.FusedSAM) and self.config.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return second if loss is None else loss

    def _firsts(self, parts: list[Batch]) -> list[Batch]:
        """Return those examples of each part that the ascent takes, at least one."""
        counts = [max(round(self.config.ascent_part * len(labels)), 1) for _, labels in parts]
        return [(images[:n], labels[:n]) for (images, labels), n in zip(parts, counts, strict=True)]

    def _gradient(self, parts: list[Batch]) -> Tensor:
        """Add the gradient of the mean loss of equal parts, which is returned; averaged over ranks with the last."""
        losses = []
        for images, labels in parts:
            with contextlib.ExitStack() as stack:
                if isinstance(self.parallel, DistributedDataParallel) and len(losses) < len(parts) - 1:
                    stack.enter_context(self.parallel.no_sync())
                with self.clock.part("forward"), self._autocast():
                    loss = self.loss(self.parallel(self.normalise(images)), labels) / len(parts)
                with self.clock.part("backward"):
                    self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.amp]
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype is not None)

    def look(self) -> dict[str, Any]:
        """Return what the steps since the last look were like, averaged; the losses are those of all ranks."""
        losses = self.ranks.sum_(torch.stack(self._pending)).div(self.ranks.size).tolist()
        self._pending.clear()
        mean = mean_of_finite(losses, self.epoch + 1, first=self.step - len(losses) + 1)
        for loss in losses:  # one by one: where a run was interrupted does not change the sum
            self.loss_sum += loss
        wall = self._lap() / len(losses)
        spent = {name: sum(ms) / len(losses) for name, ms in self.clock.read(len(losses)).items()}
        gap = self.optimizer.last.loss_gap if isinstance(self.optimizer, fused_sam.FusedSAM) else None
        return {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": mean,
            **({} if gap is None else {"loss_gap": float(gap.mean())}),  # of the last step, on this rank
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": self.config.batch_size / wall,
            "forward_ms": spent["forward"],
            "backward_ms": spent["backward"],
            "optimizer_ms": spent["step"] - spent["forward"] - spent["backward"],
            "data_ms": max(1e3 * wall - spent["step"], 0.0),
        }

    def measure(self, warm_up: int) -> dict[str, Any]:
        """Train an epoch without anything around it; figures as those of `look`, of the steps after the first ones."""
        training_mode(self.model, self.config.freeze_batchnorm)
        for parts in self.data.training(0, 0):
            if self.step == warm_up:
                self.look()
            self.train_step(parts)
            self.step += 1
        return self.look()

    def _lap(self) -> float:
        """Return the seconds since the last lap."""
        before, self._looked = self._looked, time.perf_counter()
        self.seconds += self._looked - before
        return self._looked - before

    def _point(self) -> dict[str, Any]:
        """Return the point of the history for the epoch that has been trained."""
        point = {"epoch": self.epoch + 1, "train_loss": self.loss_sum / self.data.steps, **self.evaluate(self.model)}
        if self.average is not None:
            point |= {f"ema_{name}": value for name, value in self.evaluate(self.average).items()}
        self._lap()
        return point | {"seconds": self.seconds}

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return cross entropy, and percentages of images whose class is predicted first, or among the first five."""
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.ranks.device)
        for images, labels in self.data.validation():
            with self._autocast():
                scores = model(self.normalise(images)).float()
            found = scores.topk(min(5, self.config.classes)).indices == labels[:, None]
            loss = F.cross_entropy(scores, labels, reduction="sum")
            sums += torch.stack([loss, found[:, 0].sum(), found.sum(), torch.tensor(len(labels), device=loss.device)])
        loss, first, five, images = self.ranks.sum_(sums).tolist()
        return {"val_loss": loss / images, "top1": 100 * first / images, "top5": 100 * five / images}

    def _stop_if_asked(self, requests: Requests, out: Path) -> None:
        """Stop on all ranks after the same step, whichever of them has heard the signal."""
        signum = self.ranks.largest(requests.signum)
        if not signum:
            return
        if self._pending:
            self.look()
        self.save(out)
        raise Interrupted(signum)

    def save(self, out: Path) -> None:
        """Write the checkpoint on rank 0, while the others wait. Running statistics become those of all ranks."""
        for model in (self.model, self.average):
            self.ranks.mean_([] if model is None else list(model.buffers()))
        random_states = self.ranks.gather(checkpoint.random_state(self.ranks.device))
        if self.ranks.rank == 0:
            checkpoint.save(self.state_dict() | {"random": random_states}, out / CHECKPOINT)
        self.ranks.wait()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a continued run needs beside the random states; batches follow from the seed."""
        average = None if self.average is None else self.average.state_dict()
        return checkpoint.state_of(self, COUNTS) | {"average": average, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `checkpoint.load` has read."""
        checkpoint.restore(self, state, COUNTS)
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        checkpoint.set_random_state(state["random"][self.ranks.rank], self.ranks.device)


def _average(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _parallel(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, ranks: Ranks) -> nn.Module:
    """Return what forwards go through."""
    if ranks.size == 1:
        return model
    # Running statistics are averaged before they are used, which is not in training. Newer versions have another name.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids=devices, **{sync: False})
    if isinstance(optimizer, fused_sam.FusedSAM):
        from fused_sam.distributed import data_parallel

        scope = "rank" if config.m_sharpness == "micro" else config.m_sharpness
        data_parallel(parallel, optimizer, m_sharpness=scope)
    return parallel
