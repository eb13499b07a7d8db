"""Train a small ResNet on Fashion-MNIST with SGD and with FusedSAM: 40 % of the training labels are wrong.

A SAM step makes two passes, so SGD trains twice as many epochs: the rule of Foret et al. (ICLR 2021). A tenth of the
images is held out, with right labels. It says which epoch of each run was the best, where training would best have
been stopped; the test set takes no part in that. BatchNorm statistics come from the first pass of a SAM step only.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import flags, records
from bench.records import interval
from bench.training import curves, data
from bench.training.job import HELD_OUT, PASSES, Job
from bench.training.models import WideResNet, parameter_count
from bench.training.run import check, chosen_device, complain

SOURCES = "Debian's dataset-fashion-mnist, else a download, else scikit-learn's digits"
NOISE = "this fraction of the training labels is replaced by another class"
# the paper's WRN-28-10 (section 3.1, Table 7)
FULL = {
    "train_size": 60_000,
    "label_noise": 0.0,
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
    add("--train-size", type=int, default=3_000, help="training images, drawn by the seed")
    add("--label-noise", type=float, default=0.4, metavar="P", help=f"symmetric label noise: {NOISE}")
    add("--shift", type=int, default=1, help="largest random shift, in pixels")
    add("--epochs", type=int, default=40, help="epochs of SAM; SGD gets twice as many")
    add("--batch-size", type=int, default=128, help="images per step")
    seeds = "one or several seeds of subset, noise, initial weights and order"
    add("--seed", "--seeds", dest="seeds", type=int, nargs="+", default=[0], metavar="N", help=seeds)
    add(
        "--full",
        action="store_true",
        help="the paper's WRN-28-10 with all images but those held out, and right labels, for a GPU; other flags win",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--blocks", type=int, default=1, help="blocks in each of the three stages of the wide ResNet")
    add("--width", type=int, default=2, help="the stages have 16, 32 and 64 times this many channels")
    add("--stem-stride", type=int, default=4, help="stride of the first convolution")
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
    add("--resume", action="store_true", help="go on from the checkpoint in --out, or fail; also done where it can be")
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


def budget(job: Job) -> str:
    """Return the rule both runs train under, with its numbers."""
    epochs, steps = job.config.epochs, job.steps
    sam, sgd = f"SAM {epochs} epochs x {steps} steps x 2 passes", f"SGD {2 * epochs} epochs x {steps} steps x 1 pass"
    return f"Equal budget: {sgd} = {sam} = {2 * epochs * steps:,} forward-backward passes"


def title(job: Job) -> str:
    """Name data set, size and noise."""
    config = job.config
    labels = f"{config.label_noise:.0%} label noise" if config.label_noise else "clean labels"
    return f"{config.dataset}, {config.train_size:,} training images, {labels}"


def table(job: Job) -> Table:
    """Return a table with one line per optimizer, which fits into 80 columns."""
    out = Table(title=title(job), caption=budget(job), title_justify="left", caption_justify="left")
    out.add_column("run", no_wrap=True)
    errors = ("test error %\nat the end", "best epoch,\nheld out", "test error %\nthere")
    for heading in (*errors, "step\nms", "optimizer\n% of step"):
        out.add_column(heading, justify="right", no_wrap=True)
    for kind in job.kinds:
        runs = [r for r in job.finished if r["optimizer"] == kind]
        out.add_row(
            runs[0]["label"],
            str(interval([r["test_error_final"] for r in runs])),
            "/".join(str(r["best_epoch"]) for r in runs),
            str(interval([r["test_error_best"] for r in runs])),
            f"{statistics.fmean(r['step_ms'] for r in runs):.1f}",
            f"{statistics.fmean(100 * r['optimizer_ms'] / r['step_ms'] for r in runs):.1f}",
        )
    return out


def describe(job: Job, console: Console) -> None:
    """Print what is about to be trained."""
    config, dataset = job.config, job.dataset
    tested = f"{round(HELD_OUT * config.train_size):,} of them held out; {len(dataset.test.labels):,} test images"
    console.print(f"{title(job)}, {tested}", soft_wrap=True)
    console.print(f"Data from {dataset.source}", soft_wrap=True)
    if config.label_noise:
        console.print("Label noise: always to a different class; labels held out and of the test are right")
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
        seeds = f"; mean of seeds {', '.join(map(str, job.args.seeds))}" if len(job.args.seeds) > 1 else ""
        epochs = f"SGD {2 * job.config.epochs} epochs, SAM {job.config.epochs}: as many forward-backward passes"
        about = f"{epochs}{seeds}; ring: the epoch that images held out say is best"
        curves.plot(job.finished, title(job), about, picture)
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
    else:
        job.resume_if_interrupted()
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
        console.print("Interrupted. The same command goes on.")
        return 130
    report(job, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
