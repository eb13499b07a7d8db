"""Count what ranks send to each other in one step, in every mode: python -m bench.ranks.counts

Four processes with a gloo group on this machine; rows of kind "distributed". Nothing is timed: torch's profiler counts
the collectives and their elements in one step, after steps that let DistributedDataParallel settle its buckets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench import records
from bench.speed.rivals import EagerSAM
from bench.training.models import WideResNet, parameter_count
from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel

RANKS = 4
BUCKET_MB = 0.1  # so that the small model has some
WARM_UP = 2
MICRO_BATCHES = 4
OPTIONS = {"rho": 0.05, "lr": 0.01, "momentum": 0.9}
Step = Callable[[list[tuple[Tensor, Tensor]]], None]


def _closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return run


def _eager(net: nn.Module) -> Step:
    """Both gradients averaged, as the recipe in common use does it, whatever it says."""
    model = DistributedDataParallel(net, bucket_cap_mb=BUCKET_MB)
    opt = EagerSAM(net.parameters(), **OPTIONS)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        _closure(model, batches[0])()
        opt.first_step(zero_grad=True)
        _closure(model, batches[0])()
        opt.second_step(zero_grad=True)

    return step


def _ours(net: nn.Module, ddp: bool, m: str | int, micro_batches: bool = False, **options: Any) -> Step:
    opt = FusedSAM(net.parameters(), **OPTIONS)
    model = DistributedDataParallel(net, bucket_cap_mb=BUCKET_MB) if ddp else net
    data_parallel(model, opt, m_sharpness=m, bucket_cap_mb=BUCKET_MB, **options)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        closures = [_closure(model, batch) for batch in batches]
        opt.step(closures if micro_batches else closures[0])

    return step


VARIANTS: dict[str, Callable[[nn.Module], Step]] = {
    "DDP, eager SAM": _eager,
    'DDP, FusedSAM "rank"': lambda net: _ours(net, True, "rank"),
    "DDP, FusedSAM 2": lambda net: _ours(net, True, 2),
    'DDP, FusedSAM "world"': lambda net: _ours(net, True, "world"),
    'DDP, FusedSAM "rank", 4 closures': lambda net: _ours(net, True, "rank", True),
    'FusedSAM "rank"': lambda net: _ours(net, False, "rank"),
    "FusedSAM 2": lambda net: _ours(net, False, 2),
    'FusedSAM "world"': lambda net: _ours(net, False, "world"),
    'FusedSAM "rank", 4 closures': lambda net: _ours(net, False, "rank", True),
    'FusedSAM "rank", shard_state': lambda net: _ours(net, False, "rank", shard_state=True),
}


def count(step: Callable[[], None]) -> dict[str, list[int]]:
    """Calls and elements of each collective in one step."""
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
        common: dict[str, Any] = {"variant": name, "ranks": RANKS, "parameters": parameters}
        rows.append(
            records.header("distributed") | common | {"collectives": count(lambda step=step, b=batches: step(b))}
        )
    if rank == 0:
        records.write_rows(rows, Path(out))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, append."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS / "distributed.jsonl", help="file to append to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (str(Path(folder) / "store"), str(options.out)), RANKS)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
