"""BatchNorm over the examples of all ranks: what the first pass sees, and whose loss its gradient is of.

torch.nn.SyncBatchNorm takes tensors on a GPU only, where two processes share one; on a CPU a module of the same
arithmetic stands in, out of torch's all-reduce that has a derivative.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO
from rank_oracle import close, joined, squares_of, wrapped
from ranks import on_pair
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from fused_sam import FusedSAM

EPS = 1e-3
FEATURES = 6


class Reduced(nn.Module):
    """The arithmetic of SyncBatchNorm: statistics of all ranks' examples, through which gradients flow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(FEATURES) + 0.5), nn.Parameter(torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        sums = all_reduce(torch.cat([x.sum(0), x.square().sum(0), x.new_tensor([len(x)])]))
        mean, square = (sums[:-1] / sums[-1]).split(FEATURES)
        return (x - mean) / (square - mean**2 + EPS).sqrt() * self.weight + self.bias


def network(kind: str) -> nn.Sequential:
    norm: Any = Reduced() if kind == "cpu" else nn.SyncBatchNorm(FEATURES, eps=EPS)
    return nn.Sequential(nn.Linear(5, FEATURES), norm, nn.Tanh(), nn.Linear(FEATURES, 3)).to(kind).double()


def gradients(copies: list[nn.Sequential], xs: list[Tensor]) -> list[list[Tensor]]:
    """d (L_1 + ... + L_R) / d w_r for the weights w_r of each rank, with L_r the loss of its own examples."""
    hidden = [net[0](x) for net, x in zip(copies, xs)]
    everyone = torch.cat(hidden)
    mean, deviation = everyone.mean(0), (everyone.var(0, correction=0) + EPS).sqrt()
    total = torch.zeros((), dtype=xs[0].dtype, device=xs[0].device)
    for net, h in zip(copies, hidden):
        scaled: Any = (h - mean) / deviation * net[1].weight + net[1].bias
        total = total + net[3](net[2](scaled)).square().mean()
    flat = torch.autograd.grad(total, [p for net in copies for p in net.parameters()])
    count = len(flat) // len(copies)
    return [list(flat[i : i + count]) for i in range(0, len(flat), count)]


def displaced(net: nn.Sequential, grads: list[Tensor]) -> nn.Sequential:
    there, length = copy.deepcopy(net), torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
    with torch.no_grad():
        for p, g in zip(there.parameters(), grads):
            p.add_(g, alpha=RHO / float(length))
    return there


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
KINDS = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wrap", "m"), [("ddp", "rank"), ("plain", "rank"), ("ddp", "world"), ("plain", "world")])
@on_pair
def test_an_e_is_of_the_losses_of_all_ranks(kind: str, wrap: str, m: str) -> None:
    """Against one process that has a copy of the weights for each rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = network(kind)
    oracle = copy.deepcopy(net)
    sgd = torch.optim.SGD(oracle.parameters(), **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1)
    seen: list[Tensor] = []
    for _ in range(3):
        xs = [torch.randn(4 + r, 5, dtype=torch.float64).to(kind) for r in range(size)]
        first = gradients([copy.deepcopy(oracle) for _ in xs], xs)
        if m == "world":
            first = [[torch.stack(grads).mean(0) for grads in zip(*first)]] * size
        there = [displaced(oracle, grads) for grads in first]
        for p, *grads in zip(oracle.parameters(), *gradients(there, xs)):
            p.grad = torch.stack(grads).mean(0)
        sgd.step()

        def closure(x: Tensor = xs[rank]) -> Tensor:
            seen[:] = [p.detach().clone() for p in net.parameters()]
            return squares_of(model, x)()

        opt.step(closure)
        close(seen, list(there[rank].parameters()), "w + e")
        close(list(net.parameters()), list(oracle.parameters()), "w")
