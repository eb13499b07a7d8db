"""A training step compiled as a whole: torch.compile of a function with forward, backward and optimizer in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FLOAT64_RTOL, HYPER, RHO, batches, small_net
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fused_sam import FusedSAM

Batch = tuple[Tensor, Tensor]


def backward(net: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = nn.functional.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    return loss


def two_calls(net: nn.Module, optimizer: FusedSAM, batch: Batch) -> Tensor:
    loss = backward(net, batch)
    optimizer.first_step(zero_grad=True)
    backward(net, batch)
    optimizer.second_step(zero_grad=True)
    return loss.detach()


def closure(net: nn.Module, optimizer: FusedSAM, batch: Batch) -> Tensor:
    loss: Tensor = optimizer.step(lambda: backward(net, batch))
    return loss.detach()


def two_closures(net: nn.Module, optimizer: FusedSAM, batch: Batch) -> Tensor:
    halves = [(x, y) for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True)]
    loss: Tensor = optimizer.step([lambda: backward(net, halves[0]), lambda: backward(net, halves[1])])
    return loss


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at the loss's
@pytest.mark.parametrize("step", [two_calls, closure, two_closures])
def test_a_compiled_step_is_the_plain_one(step: Callable[..., Any], backend: str, device: str) -> None:
    # Warnings are errors here: none says that the compiler has come upon what it cannot read.
    torch.compiler.reset()
    counters.clear()
    net, data = small_net(device=device), batches(5, device=device)
    twin = copy.deepcopy(net)
    optimizer = FusedSAM(net.parameters(), rho=RHO, backend=backend, **HYPER)
    plain = FusedSAM(twin.parameters(), rho=RHO, backend=backend, **HYPER)
    compiled = torch.compile(step, backend="eager")
    graphs = []
    for k, batch in enumerate(data):
        for o in (optimizer, plain):
            o.param_groups[0].update(lr=HYPER["lr"] / (k + 1), rho=RHO / (k + 1))
        expected = step(twin, plain, batch)
        torch.testing.assert_close(compiled(net, optimizer, batch), expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not optimizer.perturbed
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        buffers = (o.state[x]["momentum_buffer"] for o, x in ((optimizer, p), (plain, q)))
        torch.testing.assert_close(*buffers, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
    # The model is compiled, and neither new hyperparameters nor new state has anything compiled again.
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(data)
