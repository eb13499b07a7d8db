"""An experiment: a grid of runs, each a row, and the picture and the table that are made of them."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import bench.paper
import fused_sam
from bench import records
from bench.paper import data, flags, plan, summary, training
from bench.paper.config import Config
from bench.records import Row
from bench.training.run import chosen_backend, complain

SPEED_PERIOD = 1800.0  # seconds that the time left is estimated from: more than an epoch of a large run takes
NOTHING_YET = "No run has been recorded yet."
PICTURES = Path("../bench/results")  # as docs/paper.md sees it
Named: TypeAlias = tuple[str, Config]  # the method as tables name it, and its run


@dataclass(frozen=True)
class Experiment:
    """Holds what an experiment module declares."""

    name: str
    description: str
    grid: Callable[[argparse.Namespace, Config], list[Named]]  # of one seed; the flags with its own among them
    figure: Callable[[Sequence[Row], Path], None]
    section: Callable[[Sequence[Row]], str]  # Markdown of its block in docs/paper.md
    add_arguments: flags.Adder | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what it changes in what `flags.base_config` starts from
    execute: Callable[[Config, training.Context], Row] = training.execute
    observe: training.Observer | None = None
    observe_during: training.Observer | None = None

    def file(self, folder: Path, suffix: str) -> Path:
        """Return the path of the rows or of the picture."""
        return folder / f"paper_{self.name}.{suffix}"


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then draw and print; 0 when every run finished."""
    made = flags.parser(experiment.name, experiment.description, experiment.add_arguments, experiment.defaults)
    args = flags.parse(made, argv)
    console = Console(highlight=False, markup=False)
    try:
        dataset = data.load(args.dataset, args.data_dir, say=console.print)
        grid = experiment.grid(args, flags.base_config(args, dataset.name, experiment.defaults))
        runs = [(label, replace(config, seed=seed)) for seed in args.seeds for label, config in grid]
        context = training.Context(dataset, args.checkpoints / experiment.name)
        context.observe, context.observe_during = experiment.observe, experiment.observe_during
        failed = _run_missing(experiment, runs, context, args, console)
    except (ValueError, RuntimeError, OSError) as error:
        return complain(error)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on.")
        return 130
    rows = [row for _, row in sorted(_known(experiment, args.results, runs).items())]
    if rows:
        console.print(_table(experiment.name, rows))
        experiment.figure(rows, experiment.file(args.results, "png"))
        console.print(f"{args.results}: paper_{experiment.name}.jsonl and .png", soft_wrap=True)
    return 1 if failed else 0


def _known(experiment: Experiment, folder: Path, runs: Sequence[Named]) -> dict[int, Row]:
    """Return the rows of these runs that are in the file, by the place of their run."""
    path = experiment.file(folder, "jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = {row["key"]: row for row in map(json.loads, lines)}
    found = {place: rows[config.key] for place, (_, config) in enumerate(runs) if config.key in rows}
    return {place: row | {"method": runs[place][0]} for place, row in found.items()}


def _run_missing(
    experiment: Experiment,
    runs: Sequence[Named],
    context: training.Context,
    args: argparse.Namespace,
    console: Console,
) -> int:
    """Run, and append a row for each; return the number of runs whose loss was not finite."""
    known = _known(experiment, args.results, runs)
    missing = [named for place, named in enumerate(runs) if place not in known]
    console.print(f"{experiment.name}: {len(runs)} runs, {len(known)} of them already in {args.results}")
    shared = records.header("paper") | {
        "fused_sam": fused_sam.__version__,
        "backend": chosen_backend(None, args.device),
        "threads": args.threads,
        "experiment": experiment.name,
    }
    if args.paper and missing:
        console.print(plan.text([config for _, config in missing], context), soft_wrap=True)
    failed = 0
    with _progress(context, console, [config for _, config in missing]) as announce:
        for label, config in missing:
            announce(label, config)
            try:
                result = experiment.execute(config, context)
            except FloatingPointError as error:
                console.print(f"{label}, seed {config.seed}: {error}", style="red", soft_wrap=True)
                failed += 1
                continue
            named = {"date": records.today(), "method": label, "seed": config.seed, "key": config.key}
            row = shared | named | {"config": asdict(config)} | result
            records.write_rows([row], experiment.file(args.results, "jsonl"))
    return failed


@contextmanager
def _progress(
    context: training.Context, console: Console, runs: Sequence[Config]
) -> Iterator[Callable[[str, Config], None]]:
    """Show bars of all passes and of epochs, with the time left; yield what is called before each run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, *left, console=console, speed_estimate_period=SPEED_PERIOD) as progress:
        whole = progress.add_task("passes", total=round(sum(map(plan.passes, runs))))
        current = progress.add_task("epochs", total=1)
        done = planned = 0.0
        training: tuple[Config | None, int] = None, 0  # of a run there may be several

        def announce(label: str, config: Config) -> None:
            nonlocal done, planned, training
            done, planned, training = planned, planned + plan.passes(config), (None, 0)
            progress.update(whole, completed=round(done))
            progress.reset(current, total=config.epochs, description=f"{label}, seed {config.seed}")

        def on_epoch(config: Config, epoch: int) -> None:
            nonlocal done, training
            known = training[1] if training[0] == config and training[1] < epoch else 0
            training = config, epoch
            done = min(done + plan.passes_of_training(config) * (epoch - known) / config.epochs, planned)
            progress.update(current, completed=epoch, total=config.epochs)
            progress.update(whole, completed=round(done))

        context.on_epoch = on_epoch
        yield announce
        progress.update(whole, completed=round(planned))


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Return a table for the terminal: a line for each method, and for each of the settings that it ran with."""
    out = Table(title=title, title_justify="left")
    out.add_column("method")
    out.add_column("with", no_wrap=True)
    for heading in ("seeds", "test\nerror %", "training\nerror %", "passes", "seconds"):
        out.add_column(heading, justify="right")
    for (label,), same in summary.by(rows, "method").items():
        for settings, group in summary.by(same, *_varied(same)).items():
            spreads = [str(summary.of(group, name)) for name in ("test_error", "train_error")]
            means = [f"{summary.of(group, name).mean:.1f}" for name in ("passes", "seconds")]
            out.add_row(label, " ".join(map(str, settings)), str(len(group)), *spreads, *means)
    return out


def _varied(rows: Sequence[Row]) -> list[str]:
    """Return the names of plain values of the configuration, besides the seed, in which these rows differ."""
    plain = [name for name, value in rows[0]["config"].items() if not isinstance(value, dict) and name != "seed"]
    return [name for name in plain if len({row["config"].get(name) for row in rows}) > 1]


def experiments() -> list[Experiment]:
    """Return those of all modules of this folder that have an EXPERIMENT."""
    names = (module.name for module in pkgutil.iter_modules(bench.paper.__path__))
    modules = (importlib.import_module(f"bench.paper.{name}") for name in names)
    return [module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")]


def blocks() -> dict[str, Callable[[Sequence[Row]], str]]:
    """Return what writes each block of docs/paper.md, <!-- paper:NAME:start -->, from all rows."""
    return {f"paper:{experiment.name}": functools.partial(_block, experiment) for experiment in experiments()}


def _block(experiment: Experiment, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["kind"] == "paper" and row["experiment"] == experiment.name]
    if not own:
        return NOTHING_YET
    subject = experiment.description.splitlines()[0].partition(":")[0].rstrip(".")
    return f"{experiment.section(own)}\n\n![{subject}]({experiment.file(PICTURES, 'png').as_posix()})"
