"""The blocks of docs/paper.md: every module of this folder with an EXPERIMENT has one, <!-- paper:NAME:start -->."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

import bench.paper
from bench.paper.runner import Experiment
from bench.records import Row

NOTHING_YET = "No run has been recorded yet."
PICTURES = Path("../bench/results")  # as docs/paper.md sees it


def experiments() -> list[Experiment]:
    """All that are there."""
    names = (module.name for module in pkgutil.iter_modules(bench.paper.__path__))
    modules = (importlib.import_module(f"bench.paper.{name}") for name in names)
    return [module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")]


def blocks() -> dict[str, Callable[[Sequence[Row]], str]]:
    """Name of the block and what writes it from all rows."""
    return {f"paper:{experiment.name}": functools.partial(_block, experiment) for experiment in experiments()}


def _block(experiment: Experiment, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["kind"] == "paper" and row["experiment"] == experiment.name]
    if not own:
        return NOTHING_YET
    subject = experiment.description.splitlines()[0].partition(":")[0].rstrip(".")
    return f"{experiment.section(own)}\n\n![{subject}]({experiment.file(PICTURES, 'png').as_posix()})"
