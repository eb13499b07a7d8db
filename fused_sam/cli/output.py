"""Results as a table and as JSON; progress on stderr, with rich where it is installed."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import operator
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_sam import __version__


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return aligned columns, the first to the left; numbers with six digits."""
    lines = [list(header)] + [[f"{x:.6g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines
    )


def write_json(path: Path, options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write versions, options and results. JSON has no inf and no NaN: they are the strings "inf", "-inf" and "nan"."""
    content = {"fused_sam": __version__, "torch": torch.__version__, "options": vars(options), "results": results}
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return _plain(x.tolist())
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return str(x) if isinstance(x, Path) else x


class _Watched:
    """Data that reports each batch that is drawn, in every pass."""

    def __init__(self, batches: Iterable[Any], tick: Any) -> None:
        self._batches = batches
        self._tick = tick

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            self._tick()


@contextlib.contextmanager
def watched(data: Any, title: str, passes: int | None = None) -> Iterator[Any]:
    """Yield the data, with progress on stderr.

    Args:
        data: as `fused_sam.analysis.sharpness` takes it.
        title: of what is computed.
        passes: how many times; None if that is not known.
    """
    from fused_sam.analysis.objective import as_batches

    batches = as_batches(data)
    length = operator.length_hint(batches)  # 0 also for a loader that does not know
    total = passes * length if passes and length else None
    with _rich_bar(title, total) if _has_rich() else _plain_lines(title, total) as tick:
        yield _Watched(batches, tick)


def _has_rich() -> bool:
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _rich_bar(title: str, total: int | None) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda: progress.advance(bar)


@contextlib.contextmanager
def _plain_lines(title: str, total: int | None) -> Iterator[Any]:
    done, start = 0, time.monotonic()

    def tick() -> None:
        nonlocal done
        done += 1

    print(f"{title}{'' if total is None else f': {total} batches'} ...", file=sys.stderr)
    yield tick
    print(f"{title}: {done} batches in {time.monotonic() - start:.1f} s", file=sys.stderr)
