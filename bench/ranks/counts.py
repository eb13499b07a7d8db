"""Count what ranks send to each other in one step, in every mode: python -m bench.ranks.counts

Four processes with a gloo group on this machine; rows of kind "distributed". Nothing is timed: torch's profiler counts
the collectives and their elements in one step, after steps that let DistributedDataParallel settle its buckets.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bench import flags, records
from bench.ranks.steps import Step, eager, ours
from bench.training.models import WideResNet, parameter_count

RANKS = 4
BUCKET_MB = 0.1  # so that the small model has some
WARM_UP = 2
MICRO_BATCHES = 4


def _ours(net: nn.Module, ddp: bool, m: str | int, closures: int = 1, **options: Any) -> Step:
    return ours(net, BUCKET_MB, ddp, closures=closures, m_sharpness=m, **options)


VARIANTS: dict[str, Callable[[nn.Module], Step]] = {
    "DDP, eager SAM": lambda net: eager(net, BUCKET_MB),
    'DDP, FusedSAM "rank"': lambda net: _ours(net, True, "rank"),
    "DDP, FusedSAM 2": lambda net: _ours(net, True, 2),
    'DDP, FusedSAM "world"': lambda net: _ours(net, True, "world"),
    'DDP, FusedSAM "rank", 4 closures': lambda net: _ours(net, True, "rank", MICRO_BATCHES),
    'FusedSAM "rank"': lambda net: _ours(net, False, "rank"),
    "FusedSAM 2": lambda net: _ours(net, False, 2),
    'FusedSAM "world"': lambda net: _ours(net, False, "world"),
    'FusedSAM "rank", 4 closures': lambda net: _ours(net, False, "rank", MICRO_BATCHES),
    'FusedSAM "rank", shard_state': lambda net: _ours(net, False, "rank", shard_state=True),
}


def count(step: Callable[[], None]) -> dict[str, list[int]]:
    """Return calls and elements of each collective in one step."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    counts: dict[str, list[int]] = {}
    for event in profile.events():
        if event.name.startswith("gloo:"):
            entry = counts.setdefault(event.name.removeprefix("gloo:"), [0, 0])
            entry[0] += 1
            entry[1] += sum(torch.Size(shape).numel() for shape in event.input_shapes if shape)
    return counts


def _work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=RANKS, rank=rank)
    rows: list[records.Row] = []
    for name, make in VARIANTS.items():
        torch.manual_seed(0)
        net = WideResNet(1, 1)
        parameters, step = parameter_count(net), make(net)
        torch.manual_seed(rank)
        batches = [(torch.randn(4, 1, 28, 28), torch.randint(10, (4,))) for _ in range(MICRO_BATCHES)]
        for _ in range(WARM_UP):
            step(batches)
        row = {"variant": name, "ranks": RANKS, "parameters": parameters}
        row["collectives"] = count(lambda step=step, batches=batches: step(batches))
        rows.append(records.header("distributed") | row)
    if rank == 0:
        records.write_rows(rows, Path(out))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, append."""
    parser = flags.parser("ranks.counts", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS / "distributed.jsonl", help="file to append to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (str(Path(folder) / "store"), str(options.out)), RANKS)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
