"""What a run shows while it goes on: a bar or lines on the terminal, curves in TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.training.run import bar

TIMES = ("forward_ms", "backward_ms", "optimizer_ms", "data_ms")


class Reporter:
    """For rank 0; on the others the console is quiet, and there is no folder.

    Args:
        console: where lines go. On a terminal they are the status of a bar.
        curves: the folder for TensorBoard, None for no curves.
    """

    def __init__(self, console: Console, curves: Path | None) -> None:
        self.console = console
        self._writer = None if curves is None else _writer(curves, console)
        self._bar: Progress | None = None

    @contextlib.contextmanager
    def bar(self, done: int, steps: int) -> Iterator[None]:
        """Show a bar of ``steps`` inside the block, of which some are done."""
        disable = not self.console.is_terminal or self.console.quiet
        try:
            with bar(self.console, disable) as self._bar:
                self._task = self._bar.add_task("training", total=steps, completed=done, status="")
                yield
        finally:
            if self._writer is not None:
                self._writer.close()

    def advance(self) -> None:
        """Count a step that has been made."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def interval(self, figures: dict[str, Any], steps_made: int) -> None:
        """Show what some steps have come to.

        Args:
            figures: what `Trainer` has seen in them.
            steps_made: since the run began.
        """
        line = (
            f"epoch {figures['epoch']} step {figures['step']}  loss {figures['loss']:.4f}  lr {figures['lr']:.4g}  "
            f"{timing(figures)}"
        )
        if self._bar is not None and not self._bar.disable:
            self._bar.update(self._task, status=line)
        else:
            self.console.print(line, soft_wrap=True)
        self._add("train", figures, steps_made)

    def epoch(self, point: dict[str, Any], steps_made: int) -> None:
        """Show what an epoch and the evaluation after it have come to."""
        line = (
            f"epoch {point['epoch']}: training loss {point['train_loss']:.4f}, in validation {point['val_loss']:.4f}, "
            f"top-1 {point['top1']:.2f} %, top-5 {point['top5']:.2f} %"
        )
        if "ema_top1" in point:
            line += f"; of the average {point['ema_top1']:.2f} %, {point['ema_top5']:.2f} %"
        self.console.print(line, soft_wrap=True)
        self._add("validation", point, steps_made)

    def _add(self, group: str, figures: dict[str, Any], steps_made: int) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, steps_made)
            self._writer.flush()


def timing(figures: dict[str, Any]) -> str:
    """Write throughput, and where the time of a step goes."""
    parts = ", ".join(f"{name.removesuffix('_ms')} {figures[name]:.1f}" for name in TIMES)
    return f"{figures['images_per_second']:.1f} images/s  ({parts} ms)"


def _writer(folder: Path, console: Console) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("TensorBoard is not installed: no curves (pip install tensorboard).")
        return None
    return SummaryWriter(str(folder))
