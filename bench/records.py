"""Result rows: one JSON object a line, each with the machine, the versions and the date it belongs to."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
UNKNOWN_CACHE_BYTES = 32 << 20
REASON_LENGTH = 160

Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval: NaN for one value, which tells nothing of the spread."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """Write the mean, and the interval if there is one, with so many digits behind the point."""
        return f"{self.mean:.{digits}f}" + ("" if self.count < 2 else f" ± {self.half:.{digits}f}")


def interval(values: Sequence[float]) -> Interval:
    """Return mean ± t s / sqrt(n), t of Student's with n - 1 degrees, of n > 0 independent and normal values."""
    if not values:
        raise ValueError(f"Invalid {values=}. Must hold at least one.")
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Interval(mean, math.nan, 1)
    from scipy import stats

    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


class Spread(NamedTuple):
    """Holds a median with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return those of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[1], tenths[7])

    def rounded(self) -> dict[str, float]:
        """Return the values for a row: four significant digits are more than a measurement has."""
        return {name: float(f"{value:.4g}") for name, value in self._asdict().items()}

    def seconds(self) -> dict[str, float]:
        """Return the values for a row, of a time."""
        return {f"{name}_s": value for name, value in self.rounded().items()}


def median(values: Sequence[float]) -> float:
    """Return the median for a row."""
    return Spread.of(values).rounded()["median"]


def machine() -> Row:
    """Return everything a figure depends on besides the code: the machine without its name, and the versions."""
    return hardware() | versions()


@functools.cache
def hardware() -> Row:
    """Return the machine without its name."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache(),
        "system": platform.system(),
        "isa": _isa(),
    }


@functools.cache
def versions() -> Row:
    """Return those of Python, torch, the compiler on this machine, the rival, and the commit."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcc": _output("gcc", "-dumpfullversion"),
        "pytorch_optimizer": _distribution("pytorch-optimizer"),
        "commit": _commit(),
    }


@functools.cache
def gpu_hardware() -> Row:
    """Return the current CUDA device and its driver, beside the machine that drives it."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **{name: hardware()[name] for name in ("cpu", "cores", "system")},
    }


@functools.cache
def gpu_versions() -> Row:
    """Return `versions`, and those of what compiles and launches kernels."""
    from fused_sam import __version__

    toolkit = {"cuda": torch.version.cuda, "triton": _distribution("triton")}
    return versions() | toolkit | {"fused_sam": __version__}


def gpu_header(kind: str) -> Row:
    """Return `header` for rows from the current CUDA device."""
    return {"kind": kind, "date": today(), "machine": gpu_hardware(), "versions": gpu_versions()}


def header(kind: str) -> Row:
    """Return the part that rows of every kind have."""
    return {"kind": kind, "date": today(), "machine": hardware(), "versions": versions()}


def reason(error: BaseException) -> str:
    """Return an error in one short line, for a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:REASON_LENGTH]


def today() -> str:
    """Return the ISO date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Append rows to a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(folder: Path) -> list[Row]:
    """Return all rows of all files of a folder, oldest first."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                row["kind"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"Invalid row in {path.name}, line {number}: {error!r}.") from error
            rows.append(row)
    return sorted(rows, key=lambda row: row.get("date", ""))


def torchvision(user: str) -> ModuleType:
    """Return the package, with its transforms and data sets; few programs need it.

    Args:
        user: who needs it, for the message.
    """
    try:
        importlib.import_module("torchvision.transforms.v2")
        importlib.import_module("torchvision.datasets")
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # the second one for a build that belongs to another torch
        raise RuntimeError(
            f"{user} needs pillow and torchvision, in the version and the build (CPU, CUDA) that go with torch "
            f"{torch.__version__}; in an environment of its own pip install '.[imagenet]' finds a pair. "
            f"Importing it says: {error}."
        ) from error


def last_level_cache() -> int:
    """Return bytes of the largest cache of the first core."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text(encoding="utf-8").strip().removesuffix("K")) << 10)
    return max(sizes, default=UNKNOWN_CACHE_BYTES)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _isa() -> str | None:
    try:
        from fused_sam import _native
    except ImportError:
        return None
    return _native.isa()


def _distribution(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """Return the commit measured; "+" where the package or the kernels differ from it.

    A copy of the sources without their history is told by FUSED_SAM_COMMIT.
    """
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", "fused_sam", "csrc", "CMakeLists.txt")
    return f"{commit}+" if commit and changed else commit or os.environ.get("FUSED_SAM_COMMIT")
