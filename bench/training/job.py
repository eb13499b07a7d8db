"""The runs of a training job: SGD and SAM on equal budgets, with a checkpoint that an interrupted job goes on from."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import fused_sam
from bench import records
from bench.paper import methods
from bench.paper.config import Config
from bench.paper.data import split
from bench.paper.training import Training
from bench.training import checkpoint, data
from bench.training.run import StepClock, bar, chosen_backend

PASSES = {"sgd": 1, "sam": 2}
HELD_OUT = 0.1  # of the training images
MEASUREMENTS = 20  # of the errors in a run, at most
# What decides the figures: a checkpoint is continued under the same values only, and rows hold them.
SETTINGS = ("dataset", "train_size", "label_noise", "blocks", "width", "stem_stride", "shift", "epochs", "batch_size")
SETTINGS += ("lr", "momentum", "weight_decay", "nesterov", "rho", "adaptive", "backend", "device", "threads")


class TimedSteps:
    """Steps of SGD, or of SAM in its two calls, and the milliseconds of model and optimizer.

    Args:
        model: to train.
        config: of the run.
        on_step: called after every step with its passes.
    """

    def __init__(self, model: nn.Module, config: Config, on_step: Callable[[int], None] = lambda passes: None) -> None:
        self.optimizer = methods.make(model, config).optimizer
        self.clock, self._on_step = StepClock(torch.device(config.device)), on_step

    def step(self, loss_of: methods.LossOf, images: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Train on a batch; return the loss at w, still on the device, and the passes."""
        sam = isinstance(self.optimizer, fused_sam.FusedSAM)
        with self.clock.part("model"):
            loss = loss_of(images, targets)
            loss.backward()
        if sam:
            with self.clock.part("optimizer"):
                self.optimizer.first_step(zero_grad=True)
            with self.clock.part("model"):
                loss_of(images, targets).backward()
        with self.clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._on_step(2 if sam else 1)
        return loss.detach(), 2.0 if sam else 1.0


class Job:
    """All runs of one command, with a checkpoint after every measurement of the errors."""

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, console: Console) -> None:
        self.args, self.dataset, self.console = args, dataset, console
        given = {name: getattr(args, name, None) for name in SETTINGS} | {
            "dataset": dataset.name,
            "train_size": min(args.train_size, len(dataset.train.labels)),
            "backend": chosen_backend(args.backend, args.device),
            "threads": torch.get_num_threads(),
        }
        self.config = argparse.Namespace(**given)
        trained = self.config.train_size - round(HELD_OUT * self.config.train_size)
        if self.config.batch_size > trained:
            raise ValueError(f"Invalid {args.batch_size=}. Must be <= {trained}, the images that are not held out.")
        self.steps = trained // self.config.batch_size  # of an epoch
        noise = f"-noise{100 * self.config.label_noise:.0f}" if self.config.label_noise else ""
        self.name = dataset.name.lower() + noise + ("-full" if args.full else "")
        self.out: Path = args.out or records.ROOT / "runs" / "train" / self.name
        self.kinds = tuple(PASSES) if args.optimizer == "both" else (args.optimizer,)
        self.finished: list[dict[str, Any]] = []
        self._running: dict[str, Any] | None = None

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def resume(self) -> list[tuple[str, int]]:
        """Take over finished runs and the interrupted one, of those asked for; return all that were asked for then."""
        state, wanted = checkpoint.load(self.checkpoint, vars(self.config)), self._wanted()
        running = state["running"]
        self.finished = [run for run in state["finished"] if (run["optimizer"], run["seed"]) in wanted]
        self._running = running if running and (running["kind"], running["seed"]) in wanted else None
        return state["wanted"]

    def resume_if_interrupted(self) -> None:
        """Take over what the same job has left, unless it had come to its end."""
        same = False
        with contextlib.suppress(ValueError, FileNotFoundError):
            same = self.resume() == self._wanted()
        if same and self._missing() and (self.finished or self._running):
            self.console.print(f"Going on with the job that was interrupted: {self.checkpoint}", soft_wrap=True)
        else:
            self.finished, self._running = [], None

    def _wanted(self) -> list[tuple[str, int]]:
        return [(kind, seed) for seed in self.args.seeds for kind in self.kinds]

    def _missing(self) -> list[tuple[str, int]]:
        """Return the runs that are not finished."""
        known = [(run["optimizer"], run["seed"]) for run in self.finished]
        return [run for run in self._wanted() if run not in known]

    def run(self) -> None:
        """Do all runs that are not finished; the first bar, and the time left, are those of all."""
        missing, passes = self._missing(), 2 * self.config.epochs * self.steps
        done = (
            0 if self._running is None else PASSES[self._running["kind"]] * self._running["run"]["epoch"] * self.steps
        )
        with bar(self.console) as progress:
            progress.add_task("whole job", total=len(missing) * passes, completed=done, status="")
            for kind, seed in missing:
                self._run_one(kind, seed, progress)

    def _config_of(self, kind: str, seed: int) -> Config:
        """Return the run as the study's training loop takes it."""
        given = self.config
        same = ("dataset", "train_size", "shift", "batch_size", "lr", "momentum", "weight_decay", "nesterov", "device")
        sam = {"rho": given.rho, "adaptive": given.adaptive, "backend": given.backend}
        return Config(
            **{name: getattr(given, name) for name in same},
            model=f"wrn-{6 * given.blocks + 4}-{given.width}-stride{given.stem_stride}",
            augment="basic",
            epochs=2 * given.epochs // PASSES[kind],
            seed=seed,
            noise_rate=given.label_noise,
            validation=HELD_OUT,
            measurements=math.ceil(given.epochs / math.ceil(given.epochs / MEASUREMENTS)),  # after as many passes
            optimizer=kind,
            options=sam if kind == "sam" else {},
        )

    def _label(self, kind: str) -> str:
        """Return how tables and pictures name a run."""
        return "SGD" if kind == "sgd" else f"{'ASAM' if self.config.adaptive else 'SAM'} rho={self.config.rho:g}"

    def _run_one(self, kind: str, seed: int, progress: Progress) -> None:
        config = self._config_of(kind, seed)
        whole = progress.tasks[0]
        steps = functools.partial(TimedSteps, on_step=lambda passes: progress.advance(whole.id, passes))
        run = Training(config, split(self.dataset, config), make_stepper=steps)
        times: dict[str, list[float]] = {"model": [], "optimizer": []}
        if self._running is not None and (self._running["kind"], self._running["seed"]) == (kind, seed):
            run.load_state_dict(self._running["run"])
            times = self._running["times"]
        name = f"{self._label(kind)} seed {seed}" if len(self.args.seeds) > 1 else self._label(kind)
        task = progress.add_task(name, total=config.epochs, completed=run.epoch, status="")
        while not run.finished:
            known = len(run.history)
            try:
                run.advance()
            except FloatingPointError as error:
                raise FloatingPointError(f"{self._label(kind)}, seed {seed}: {error}") from error
            for part, milliseconds in run.stepper.clock.read(len(run.batches)).items():
                times[part].append(statistics.median(milliseconds))
            progress.update(task, completed=run.epoch)
            if len(run.history) == known:
                continue
            point = _name_errors(run)
            errors = f"error: held out {point['held_out_error']:.1f}, test {point['test_error']:.1f} %"
            status = f"epoch {run.epoch}/{config.epochs}  loss {point['train_loss']:.3f}  {errors}"
            progress.update(task, status=status)
            if not self.console.is_terminal:
                left = datetime.timedelta(seconds=round(whole.time_remaining or 0))
                self.console.print(f"{name} {status}  {left} left", soft_wrap=True)
            running = {"kind": kind, "seed": seed, "run": run.state_dict(), "times": times}
            if run.finished:
                self.finished.append(self._result(kind, run, times))
            self._save(None if run.finished else running)

    def _result(self, kind: str, run: Training, times: dict[str, list[float]]) -> dict[str, Any]:
        """Return what the table, the picture and the result rows show."""
        model_ms, optimizer_ms = (statistics.median(times[part]) for part in ("model", "optimizer"))
        best = min(run.history, key=lambda point: point["held_out_error"])
        return {
            "optimizer": kind,
            "label": self._label(kind),
            "seed": run.config.seed,
            "run_epochs": run.epoch,
            "steps": run.epoch * len(run.batches),
            "test_error_final": run.history[-1]["test_error"],
            "test_error_best": best["test_error"],  # where the error of the images held out is lowest
            "best_epoch": best["epoch"],
            "step_ms": model_ms + optimizer_ms,
            "optimizer_ms": optimizer_ms,
            "seconds": run.seconds,  # of the processor on a CPU
            "history": run.history,
        }

    def _save(self, running: dict[str, Any] | None) -> None:
        state = {"config": vars(self.config), "wanted": self._wanted(), "finished": self.finished, "running": running}
        checkpoint.save(state, self.checkpoint)

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON row per run."""
        shared = records.header("train") | {"fused_sam": fused_sam.__version__, "job": self.name} | vars(self.config)
        return [shared | result for result in self.finished]


def _name_errors(run: Training) -> dict[str, Any]:
    """Return the last point of the history, once it has the errors of both sets under their own names."""
    point = run.history[-1]
    point["held_out_error"], point["test_error"] = point["test_error"], run.evaluate(run.images.unseen)[0]
    return point
