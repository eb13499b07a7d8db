"""What the tests of sharded state step, and what they compare."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from helpers import HYPER, RHO, batches, bits, closure_for
from rank_oracle import Oracle, close
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fused_sam import FusedSAM

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "plain": (SGD, {"lr": 0.13, "weight_decay": 0.017}),
    "nesterov": (SGD, HYPER | {"nesterov": True}),
    "dampening": (SGD, HYPER | {"dampening": 0.3}),
    "amsgrad": (Adam, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.013, "weight_decay": 0.17}),
    # Not fused: torch's own step, on the same pieces.
    "tensor betas": (Adam, {"lr": 0.013, "betas": (torch.tensor(0.8), torch.tensor(0.97)), "foreach": False}),
}
SMALL = 0.0005  # MiB: several buckets
State = dict[str, Any]


def flat_state(state_dict: State) -> dict[tuple[int, str], Any]:
    return {
        (i, key): (bits(x), x.shape, x.dtype) if isinstance(x, Tensor) else x
        for i, entries in state_dict["state"].items()
        for key, x in entries.items()
    }


def elements(opt: FusedSAM) -> int:
    """Of state, but for the counts of steps."""
    return sum(x.numel() for s in opt.state.values() for key, x in s.items() if key != "step")


def steps(net: nn.Module, opt: FusedSAM, oracle: Oracle, numbers: range, size: int) -> None:
    """Steps on examples that are known by their number."""
    for number in numbers:
        torch.manual_seed(number)
        shards = batches(size)
        oracle.step([[shard] for shard in shards])
        opt.step(closure_for(net, shards[dist.get_rank()]))
        close(list(net.parameters()), list(oracle.net.parameters()), f"w after step {number}")


def optimizer_for(net: nn.Module, base: str) -> FusedSAM:
    kind, options = BASES[base]
    return FusedSAM(net.parameters(), kind, rho=RHO, **options)


ORACLES = {"nesterov": {"base": "sgd"}, "amsgrad": {"base": "adam"}}


def oracle_for(net: nn.Module, base: str) -> Oracle:
    return Oracle(net, 1, rho=RHO, **ORACLES[base], **BASES[base][1])
