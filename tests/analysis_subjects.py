"""What the tests of fused_sam.analysis measure: small networks, data, and everything that has to stay as it is."""

from __future__ import annotations

from typing import Any

import torch
from helpers import bits, snapshot
from torch import Tensor, nn


class Params(nn.Module):
    """Parameters of some sizes, each a slice of a longer tensor; the output is all of them."""

    def __init__(self, sizes: list[int], dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(n + 1, dtype=dtype, device=device)[1:] for n in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.weights)


def data_of(sizes: list[int], dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Batches for `small_net` with these numbers of examples."""
    return [(torch.randn(n, 3, 4, 4).to(device=device, dtype=dtype), torch.randint(4, (n,)).to(device)) for n in sizes]


class Restless(nn.Module):
    """Running statistics, dropout, a part in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.4)
        self.last = nn.Linear(20, 4)
        self.last.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))).flatten(1))


def everything(net: nn.Module) -> tuple[list[bytes], list[bool], list[Any], bytes]:
    grads = [None if p.grad is None else bits(p.grad) for p in net.parameters()]
    return snapshot(net.state_dict().values()), [m.training for m in net.modules()], grads, bits(torch.get_rng_state())


class Mishap(BaseException):
    """Something no `except Exception` sees, as KeyboardInterrupt."""


class Loss:
    """Cross-entropy that counts its calls, and may fail in one of them."""

    def __init__(self, failing_call: int | None = None) -> None:
        self.calls, self.failing_call = 0, failing_call

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.failing_call:
            raise Mishap
        return nn.functional.cross_entropy(output, y)


def restless() -> tuple[Restless, list[tuple[Tensor, Tensor]]]:
    """A network that has a gradient from before, and data for it."""
    net = Restless()
    net.last.weight.grad = torch.full_like(net.last.weight, 3.0)
    return net, data_of([6, 3], torch.float32)
