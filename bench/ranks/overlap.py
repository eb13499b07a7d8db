"""Time steps of ranks that send over links of a limited rate: python -m bench.ranks.overlap

How much of the averaging of gradients backward hides. Each rank is a process of one thread in a network namespace of
its own (links.py; root and iproute2), with gloo. In every round each variant makes some steps, in an order that
changes; ratios are of times in one round. Rows of kind "overlap".
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from bench import flags, records
from bench.ranks import links
from bench.ranks.steps import Step, eager, ours
from bench.records import Spread
from bench.training.models import WideResNet, parameter_count

RANKS = 2
MEGABITS = 500.0
ROUNDS = 15
STEPS = 2  # of a variant in a round
WARM_UP = 2
MODEL = "WRN-16-4"
BATCH = 16
BUCKET_MB = 1.0
SILENT = "no communication"
LATE = "all-reduce after backward"


def _alone() -> Any:
    """Return a group of this rank."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


VARIANTS: dict[str, Callable[[nn.Module], Step]] = {
    # Buckets and all, with a group of one rank.
    SILENT: lambda net: ours(net, BUCKET_MB, process_group=_alone()),
    "FusedSAM": lambda net: ours(net, BUCKET_MB),
    LATE: lambda net: ours(net, BUCKET_MB, late=True),
    "FusedSAM, shard_state": lambda net: ours(net, BUCKET_MB, shard_state=True),
    "DDP, FusedSAM": lambda net: ours(net, BUCKET_MB, ddp=True),
    "DDP, eager SAM": lambda net: eager(net, BUCKET_MB),
}


def _slowest(seconds: float) -> float:
    """Return the most of all ranks; the clock has stopped."""
    time_ = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(time_, op=dist.ReduceOp.MAX)
    return float(time_)


def measure(rounds: int, steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return seconds of a step in each round and bytes sent in one, by variant."""
    torch.manual_seed(dist.get_rank())
    batch = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    made = {}
    for name, make in VARIANTS.items():
        torch.manual_seed(0)
        made[name] = make(WideResNet(2, 4))
        for _ in range(WARM_UP):
            made[name]([batch])
    times: dict[str, list[float]] = {name: [] for name in made}
    sent = dict.fromkeys(made, 0)
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(made), len(made)):
            dist.barrier()
            before, start = links.sent_bytes(), time.perf_counter()
            for _ in range(steps):
                made[name]([batch])
            seconds = time.perf_counter() - start
            sent[name] += links.sent_bytes() - before
            times[name].append(_slowest(seconds) / steps)
    return times, {name: total / (rounds * steps) for name, total in sent.items()}


def _work(options: argparse.Namespace) -> None:
    """Measure on one rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = links.DEVICE
    dist.init_process_group("gloo", f"file://{options.store}", world_size=options.ranks, rank=options.rank)
    times, sent = measure(options.rounds, options.steps)
    if options.rank == 0:
        records.write_rows(rows(options, times, sent), options.out)
    dist.barrier()
    dist.destroy_process_group()


def rows(options: argparse.Namespace, times: dict[str, list[float]], sent: dict[str, float]) -> list[records.Row]:
    """Return one for each variant, its times over those in the same rounds without communication and after backward."""
    common = {
        **{"model": MODEL, "batch": BATCH, "parameters": parameter_count(WideResNet(2, 4)), "bucket_mb": BUCKET_MB},
        **{"ranks": options.ranks, "megabits": options.megabits, "rounds": options.rounds, "steps": options.steps},
    }
    made = []
    for name, seconds in times.items():
        row = {"variant": name} | Spread.of(seconds).seconds()
        row["sent_bytes"] = round(sent[name])
        row["ratio_to_silent"] = Spread.of([a / b for a, b in zip(seconds, times[SILENT])]).rounded()
        row["ratio_to_late"] = Spread.of([a / b for a, b in zip(seconds, times[LATE])]).rounded()
        made.append(records.header("overlap") | common | row)
    return made


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = flags.parser("ranks.overlap", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--ranks", type=int, default=RANKS, help="processes")
    add("--megabits", type=float, default=MEGABITS, help="a second, of each link each way")
    add("--rounds", type=int, default=ROUNDS, help="of all variants")
    add("--steps", type=int, default=STEPS, help="of each variant in a round")
    add("--out", type=Path, default=records.RESULTS / "distributed_overlap.jsonl", help="file to append to")
    add("--rank", type=int, help=argparse.SUPPRESS)
    add("--store", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.ranks - 1, options.megabits, options.rounds, options.steps) <= 0:
        parser.error("--ranks must be >= 2, all other numbers > 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the links, start a process on each, print what they wrote."""
    options = parse_arguments(arguments)
    if options.rank is not None:
        _work(options)
        return 0
    with tempfile.TemporaryDirectory() as folder, links.links(options.ranks, options.megabits) as names:
        out = Path(folder) / "rows.jsonl"
        common = [sys.executable, "-m", "bench.ranks.overlap", "--store", f"{folder}/store", "--out", str(out)]
        common += [f"--{name}={getattr(options, name)}" for name in ("ranks", "megabits", "rounds", "steps")]
        processes = [subprocess.Popen(links.inside(name, *common, f"--rank={rank}")) for rank, name in enumerate(names)]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            return 1
        made = records.read(Path(folder))
    records.write_rows(made, options.out)
    console = Console(highlight=False, soft_wrap=True)
    for row in made:
        ratio = row["ratio_to_silent"]
        console.print(
            f"{row['variant']:26}{1e3 * row['median_s']:8.1f} ms {ratio['median']:6.2f} "
            f"[{ratio['p20']:.2f}, {ratio['p80']:.2f}]{row['sent_bytes'] / 1e6:8.1f} MB sent"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
