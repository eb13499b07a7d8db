"""Train a small ResNet on Fashion-MNIST with SGD and with FusedSAM under an equal budget of passes.

A SAM step makes two passes, so SGD trains twice as many epochs: the rule of Foret et al. (ICLR 2021).
BatchNorm statistics come from the first pass of a SAM step only.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fused_sam
from bench import flags, records
from bench.paper import methods
from bench.paper.config import Config
from bench.paper.data import split
from bench.paper.training import Training
from bench.tables import mean
from bench.training import checkpoint, curves, data
from bench.training.models import WideResNet, parameter_count
from bench.training.run import StepClock, bar, check, chosen_backend, chosen_device, complain

SOURCES = "Debian's dataset-fashion-mnist, else a download, else scikit-learn's digits"
NOISE = "this fraction of the training labels is replaced by another class"
PASSES = {"sgd": 1, "sam": 2}
MEASUREMENTS = 20  # of the test error in a run, at most
# What decides the figures: a checkpoint is continued under the same values only, and rows hold them.
SETTINGS = ("dataset", "train_size", "label_noise", "blocks", "width", "stem_stride", "shift", "epochs", "batch_size")
SETTINGS += ("lr", "momentum", "weight_decay", "nesterov", "rho", "adaptive", "backend", "device", "threads")
# the paper's WRN-28-10 (section 3.1, Table 7)
FULL = {
    "train_size": 60_000,
    "blocks": 4,
    "width": 10,
    "stem_stride": 1,
    "shift": 4,
    "epochs": 200,
    "batch_size": 256,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = flags.parser("training.fashion_mnist", __doc__)
    _add_task(parser.add_argument_group("task"))
    _add_model(parser.add_argument_group("model and optimizers"))
    _add_machine(parser.add_argument_group("machine and files"))
    return parser


def _add_task(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data-dir", type=Path, help=f"folder with the four idx files, raw or .gz (default: {SOURCES})")
    add("--train-size", type=int, default=4_000, help="training images, drawn by the seed")
    add("--label-noise", type=float, default=0.0, metavar="P", help=f"symmetric label noise: {NOISE}")
    add("--shift", type=int, default=1, help="largest random shift, in pixels")
    add("--epochs", type=int, default=40, help="epochs of SAM; SGD gets twice as many")
    add("--batch-size", type=int, default=128, help="images per step")
    seeds = "one or several seeds of subset, noise, initial weights and order"
    add("--seed", "--seeds", dest="seeds", type=int, nargs="+", default=[0], metavar="N", help=seeds)
    add("--full", action="store_true", help="the paper's WRN-28-10 on all images, for a GPU; other flags win")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--blocks", type=int, default=1, help="blocks in each of the three stages of the wide ResNet")
    add("--width", type=int, default=2, help="the stages have 16, 32 and 64 times this many channels")
    add("--stem-stride", type=int, default=2, help="stride of the first convolution")
    add("--optimizer", choices=("both", *PASSES), default="both", help="which runs")
    add("--rho", type=float, help="radius of the perturbation (default: 0.05; 0.1 with label noise)")
    add("--adaptive", action="store_true", help="adaptive SAM")
    add("--lr", type=float, default=0.1, help="first learning rate of the cosine schedule")
    add("--momentum", type=float, default=0.9, help="of both runs")
    add("--weight-decay", type=float, default=5e-4, help="of both runs, on all parameters")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--backend", help="FusedSAM's backend (default: the best that works)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--out", type=Path, help="folder of checkpoint, picture and rows (default: runs/train/JOB)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--results", type=Path, metavar="FILE", help="append the rows here (default: results.jsonl in --out)")
    add("--record", action="store_true", help="write rows and picture to bench/results")
    add("--no-plot", action="store_true", help="no picture")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return parsed and checked flags, with the defaults that depend on other flags filled in."""
    parser = build_parser()
    if parser.parse_args(argv).full:
        parser.set_defaults(**FULL)
    args = parser.parse_args(argv)
    if args.rho is None:
        args.rho = 0.1 if args.label_noise else 0.05
    args.device = chosen_device(args.device)
    try:
        check(args, ">= 1", lambda x: x >= 1, "train_size", "epochs", "batch_size", "stem_stride")
        check(args, ">= 0", lambda x: x >= 0, "shift")
        check(args, "in [0, 1)", lambda x: 0 <= x < 1, "label_noise")
    except ValueError as error:
        parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


class TimedSteps:
    """Steps of SGD, or of SAM in its two calls, and the milliseconds of model and optimizer."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.optimizer = methods.make(model, config).optimizer
        self.clock = StepClock(torch.device(config.device))

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
        return loss.detach(), 2.0 if sam else 1.0


class Job:
    """All runs of one command, with a checkpoint after every measurement of the test error."""

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, console: Console) -> None:
        self.args, self.dataset, self.console = args, dataset, console
        given = {name: getattr(args, name, None) for name in SETTINGS} | {
            "dataset": dataset.name,
            "train_size": min(args.train_size, len(dataset.train.labels)),
            "backend": chosen_backend(args.backend, args.device),
            "threads": torch.get_num_threads(),
        }
        self.config = argparse.Namespace(**given)
        if self.config.batch_size > self.config.train_size:
            raise ValueError(f"Invalid {args.batch_size=}. Must be <= {self.config.train_size}, the training images.")
        noise = f"-noise{100 * self.config.label_noise:.0f}" if self.config.label_noise else ""
        self.name = dataset.name.lower() + noise + ("-full" if args.full else "")
        self.out: Path = args.out or records.ROOT / "runs" / "train" / self.name
        self.kinds = tuple(PASSES) if args.optimizer == "both" else (args.optimizer,)
        self.finished: list[dict[str, Any]] = []
        self._running: dict[str, Any] | None = None

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def resume(self) -> None:
        """Take over finished runs and the interrupted one."""
        state = checkpoint.load(self.checkpoint, vars(self.config))
        self.finished, self._running = state["finished"], state["running"]

    def run(self) -> None:
        """Do all runs that are not finished."""
        with bar(self.console) as progress:
            for seed in self.args.seeds:
                for kind in self.kinds:
                    if not any((r["optimizer"], r["seed"]) == (kind, seed) for r in self.finished):
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
            measurements=math.ceil(given.epochs / math.ceil(given.epochs / MEASUREMENTS)),  # after as many passes
            optimizer=kind,
            options=sam if kind == "sam" else {},
        )

    def _label(self, kind: str) -> str:
        """Return how tables and pictures name a run."""
        return "SGD" if kind == "sgd" else f"{'ASAM' if self.config.adaptive else 'SAM'} rho={self.config.rho:g}"

    def _run_one(self, kind: str, seed: int, progress: Progress) -> None:
        config = self._config_of(kind, seed)
        run = Training(config, split(self.dataset, config), make_stepper=TimedSteps)
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
            point = run.history[-1]
            status = (
                f"epoch {run.epoch}/{config.epochs}  loss {point['train_loss']:.3f}  "
                f"test error {point['test_error']:.2f} %"
            )
            progress.update(task, status=status)
            if not self.console.is_terminal:
                self.console.print(f"{name} {status}")
            running = {"kind": kind, "seed": seed, "run": run.state_dict(), "times": times}
            if run.finished:
                self.finished.append(self._result(kind, run, times))
            self._save(None if run.finished else running)

    def _result(self, kind: str, run: Training, times: dict[str, list[float]]) -> dict[str, Any]:
        """Return what the table, the picture and the result rows show."""
        model_ms, optimizer_ms = (statistics.median(times[part]) for part in ("model", "optimizer"))
        errors = [point["test_error"] for point in run.history]
        return {
            "optimizer": kind,
            "label": self._label(kind),
            "seed": run.config.seed,
            "run_epochs": run.epoch,
            "steps": run.epoch * len(run.batches),
            "test_error_final": errors[-1],
            "test_error_best": min(errors),
            "step_ms": model_ms + optimizer_ms,
            "optimizer_ms": optimizer_ms,
            "seconds": run.seconds,  # of the processor on a CPU
            "history": run.history,
        }

    def _save(self, running: dict[str, Any] | None) -> None:
        state = {"config": vars(self.config), "finished": self.finished, "running": running}
        checkpoint.save(state, self.checkpoint)

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON row per run."""
        shared = records.header("train") | {"fused_sam": fused_sam.__version__, "job": self.name} | vars(self.config)
        return [shared | result for result in self.finished]


def budget(job: Job) -> str:
    """Return the rule both runs train under, with its numbers."""
    config = job.config
    steps = config.train_size // config.batch_size
    sam = f"SAM {config.epochs} epochs x {steps} steps x 2 passes"
    sgd = f"SGD {2 * config.epochs} epochs x {steps} steps x 1 pass"
    return f"Equal budget: {sgd} = {sam} = {2 * config.epochs * steps:,} forward-backward passes"


def title(job: Job) -> str:
    """Name data set, size and noise."""
    config = job.config
    labels = f"{config.label_noise:.0%} label noise" if config.label_noise else "clean labels"
    return f"{config.dataset}, {config.train_size:,} training images, {labels}"


def table(job: Job) -> Table:
    """Return a table with one line per optimizer."""
    out = Table(title=title(job), caption=budget(job), title_justify="left", caption_justify="left")
    out.add_column("run")
    errors = ("test error %\nfinal", "test error %\nbest")
    for heading in ("epochs", *errors, "step\nms", "optimizer\n% of step", "training\ns"):
        out.add_column(heading, justify="right", no_wrap=True)
    for kind in job.kinds:
        runs = [r for r in job.finished if r["optimizer"] == kind]
        out.add_row(
            runs[0]["label"],
            str(runs[0]["run_epochs"]),
            mean([r["test_error_final"] for r in runs]),
            mean([r["test_error_best"] for r in runs]),
            f"{statistics.fmean(r['step_ms'] for r in runs):.1f}",
            f"{statistics.fmean(100 * r['optimizer_ms'] / r['step_ms'] for r in runs):.1f}",
            f"{statistics.fmean(r['seconds'] for r in runs):.0f}",
        )
    return out


def describe(job: Job, console: Console) -> None:
    """Print what is about to be trained."""
    config, dataset = job.config, job.dataset
    console.print(f"{title(job)}; {len(dataset.test.labels):,} test images", soft_wrap=True)
    console.print(f"Data from {dataset.source}", soft_wrap=True)
    if config.label_noise:
        console.print("Label noise: symmetric, always to a different class; the test labels are clean")
    model = WideResNet(config.blocks, config.width, config.stem_stride)
    name = f"WRN-{6 * config.blocks + 4}-{config.width}"
    where = f"{config.device}, {config.threads} threads, backend {config.backend}"
    console.print(f"{name}, {parameter_count(model):,} parameters; {where}; seeds {job.args.seeds}")
    console.print(budget(job), soft_wrap=True)


def report(job: Job, console: Console) -> None:
    """Print the table, write picture and rows."""
    console.print(table(job))
    if not job.args.no_plot:
        picture = records.RESULTS / f"train_{job.name}.png" if job.args.record else job.out / "curves.png"
        seeds = f"; mean of seeds {job.args.seeds}" if len(job.args.seeds) > 1 else ""
        curves.plot(job.finished, title(job), budget(job) + seeds, picture)
        console.print(f"Picture: {picture}", soft_wrap=True)
    recorded = records.RESULTS / "train_fashion_mnist.jsonl" if job.args.record else job.out / "results.jsonl"
    path = job.args.results or recorded
    records.write_rows(job.rows(), path)
    console.print(f"Rows: {path}", soft_wrap=True)


def prepare(args: argparse.Namespace, console: Console) -> Job:
    """Return the job with its data, and with the checkpoint if it resumes; refuses what cannot work."""
    dataset = data.load(args.data_dir, say=console.print)
    if args.record and dataset.name != "Fashion-MNIST":
        raise ValueError(f"Invalid --record with {dataset.name}. Must be Fashion-MNIST.")
    job = Job(args, dataset, console)
    if args.resume:
        job.resume()
    return job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it finished."""
    args = parse_args(argv)
    console = Console(highlight=False, markup=False)
    try:
        job = prepare(args, console)
    except (ValueError, RuntimeError, OSError) as error:
        return complain(error)
    describe(job, console)
    try:
        job.run()
    except FloatingPointError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. The same command with --resume goes on.")
        return 130
    report(job, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
