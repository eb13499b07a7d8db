"""Measure the memory of a whole SAM step, forward and backward passes included: python -m bench.speed.memory

Two meters, each on each variant in a process of its own. torch's profiler reports every allocation of
torch's CPU allocator, so live bytes, their peak and what stays between steps are exact and repeat. It
forgets the release of a block that is older than the profile, which would charge whoever replaces
parameters for the old ones, so the profile begins before the model exists. It cannot see what a library
takes by itself; for that the system's count of resident memory at its highest (VmHWM) stands beside it,
which also counts what the heap keeps: a check, no more.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench import records
from bench.speed import rivals
from bench.speed.harness import finish, parse, parser
from bench.speed.rivals import VARIANTS, TwoPass

CHANNELS, LAYERS, SIZE, BATCH = 512, 6, 8, 4
WARM_UP_STEPS = 2
LABEL = "measured step"


def build_model() -> nn.Module:
    """Return 57 MB of convolutions whose activations are small: the parameters decide the peak."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Step:
    """A whole step of a variant on the model; plain SGD makes one pass."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = build_model()
        self.input = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
        self.name = name
        self.optimizer: TwoPass | None = None

    @property
    def params(self) -> list[Tensor]:
        """Return those of the model."""
        return list(self.model.parameters())

    def build(self) -> None:
        """Make the optimizer."""
        self.optimizer = VARIANTS[self.name].build(self.params)

    def backward(self) -> None:
        """Make a forward and a backward pass."""
        self.model(self.input).square().mean().backward()

    def run(self) -> None:
        """Make both passes; no gradient is left."""
        assert self.optimizer is not None
        if self.name != rivals.SCALE:
            self.backward()
            self.optimizer.first_step(zero_grad=True)
        self.backward()
        self.optimizer.second_step(zero_grad=True)


def train(name: str) -> Step:
    """Make model, optimizer and a few steps; the last one under the profiler's label."""
    step = Step(name)
    step.build()
    for _ in range(WARM_UP_STEPS):
        step.run()
    with torch.profiler.record_function(LABEL):
        step.run()
    return step


def allocated(name: str) -> dict[str, int]:
    """Return bytes of torch's allocator: of parameters, kept beyond them and momentum, the last step's peak."""
    torch.set_num_threads(1)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step = train(name)
    events = profile.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == LABEL)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    parameter_bytes = sum(p.nbytes for p in step.params)
    live = highest = 0
    for time, nbytes in changes:
        live += nbytes
        highest = max(highest, live) if time >= begin else live
    kept = live - 2 * parameter_bytes - step.input.nbytes
    return {"parameter_bytes": parameter_bytes, "persistent_extra_bytes": kept, "peak_bytes": highest}


def resident(name: str) -> int | None:
    """Return the growth of resident memory at its highest; None where the system does not tell."""
    torch.set_num_threads(1)
    try:
        before = _status("VmRSS")
        train(name)
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    raise OSError(f"no {key}")


def in_process(function: Callable[[str], Any], name: str) -> Any:
    """Call in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, name).result()


def rows() -> list[records.Row]:
    """Return one row per variant, with its peaks over those of plain SGD."""
    made = []
    for name in rivals.available(torch.float32):
        peak = {"peak_resident_bytes": in_process(resident, name)}
        made.append({"variant": name} | in_process(allocated, name) | peak)
    scale = next(row for row in made if row["variant"] == rivals.SCALE)
    for row in made:
        row["peak_over_sgd_bytes"] = row["peak_bytes"] - scale["peak_bytes"]
        known = row["peak_resident_bytes"] is not None
        over = row["peak_resident_bytes"] - scale["peak_resident_bytes"] if known else None
        row["peak_resident_over_sgd_bytes"] = over
    common = {"set": f"{LAYERS} x conv {CHANNELS}", "dtype": "fp32", "threads": 1}
    return [records.header("memory") | common | row for row in made]


def describe(row: records.Row) -> str:
    """Return one line for the terminal."""
    names = ("peak_over_sgd_bytes", "peak_resident_over_sgd_bytes", "persistent_extra_bytes")
    cells = (f"{row[name] / 1e6:9.1f}" if row[name] is not None else "        -" for name in names)
    return f"{row['variant']:26}{''.join(cells)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse(parser("memory", __doc__), arguments)
    made = rows()
    console = Console(highlight=False, soft_wrap=True)
    console.print("MB: peak over SGD's; resident peak over SGD's; kept beyond parameters and momentum")
    finish(made, options, console, describe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
