"""Running statistics: one update per SAM step, as if there were no second pass."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from helpers import HYPER, RHO, assert_same_bits, bits, snapshot
from torch import Tensor, nn

from fused_sam import FusedSAM
from fused_sam.batchnorm import first_pass_only, frozen_statistics


class Normed(nn.Module):
    """Every kind of layer that keeps running statistics, one nested, one in evaluation mode."""

    def __init__(self, momentum: float | None = 0.37) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.inner = nn.Sequential(nn.BatchNorm2d(6, momentum=momentum), nn.Tanh(), nn.Sequential(nn.Flatten()))
        self.frozen = nn.BatchNorm1d(24, momentum=momentum)
        self.instance = nn.InstanceNorm1d(24, momentum=0.37, track_running_stats=True)
        self.untracked = nn.BatchNorm1d(24, track_running_stats=False)
        self.bare = nn.BatchNorm1d(24, momentum=momentum, affine=False)
        self.out = nn.Linear(24, 2)
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.frozen(self.inner(self.conv(x)))
        h = self.instance(h.unsqueeze(2).expand(-1, -1, 5) * torch.arange(1.0, 6.0)).mean(2)
        return self.out(self.bare(self.untracked(h + 0.1 * self.inner(self.conv(x)))))


momenta = pytest.mark.parametrize("momentum", [0.37, None], ids=["momentum", "cumulative"])


def statistics(net: nn.Module) -> list[Tensor]:
    return [b for _, b in net.named_buffers()]


def images() -> Tensor:
    return torch.randn(7, 3, 4, 4) * 2 + 1


def loss_closure(net: nn.Module, x: Tensor) -> Any:
    def closure() -> Tensor:
        loss = net(x).square().mean()
        loss.backward()
        return loss

    return closure


@momenta
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("interrupted", [False, True])
def test_frozen_statistics_keep_their_bits_and_thaw(momentum: float | None, depth: int, interrupted: bool) -> None:
    net, x = Normed(momentum), images()
    net(x)
    before, twin = snapshot(statistics(net)), copy.deepcopy(net)
    modes = [(m.training, getattr(m, "momentum", 0)) for m in net.modules()]

    def forward(depth: int) -> None:
        if depth == 0:
            net(x)
            assert [(m.training, getattr(m, "momentum", 0)) for m in net.modules()] == modes
            if interrupted:
                raise KeyboardInterrupt
            return
        with frozen_statistics(net):
            forward(depth - 1)

    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        forward(depth)
    assert_same_bits(statistics(net), before, "statistic")
    assert [(m.training, getattr(m, "momentum", 0)) for m in net.modules()] == modes
    y = images()
    net(y)
    twin(y)
    assert_same_bits(statistics(net), statistics(twin), "statistic")
    assert snapshot(statistics(net)) != before


def test_frozen_layers_still_normalise_by_the_batch() -> None:
    net, x = Normed(), images()
    twin = copy.deepcopy(net)
    before = snapshot(statistics(twin))
    with frozen_statistics(net):
        out, expected = net(x), twin(x)
    assert snapshot(statistics(twin)) != before  # only the model given is frozen
    assert bits(out) == bits(expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_same_bits([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()], "gradient")


def test_layers_in_evaluation_mode_stay_in_it_and_use_their_statistics() -> None:
    net, x = Normed(), images()
    for _ in range(3):
        net(x)
    net.eval()
    expected = net(x)
    with frozen_statistics(net):
        assert bits(net(x)) == bits(expected)
        assert not any(m.training for m in net.modules())
    assert not any(m.training for m in net.modules())
    assert bits(net(x)) == bits(expected)


@momenta
@pytest.mark.parametrize("form", ["closure", "two calls", "by hand", "twice"])
def test_each_step_counts_the_batch_once_at_w(momentum: float | None, form: str, backend: str) -> None:
    net = Normed(momentum)
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, **HYPER)
    if form != "by hand":
        first_pass_only(net, opt)
    for _ in range(4):
        x = images()
        closure = loss_closure(net, x)
        once = Normed(momentum)
        once.load_state_dict(net.state_dict())
        once(x)
        if form == "closure":
            opt.step(closure)
        else:
            opt.zero_grad()
            closure()
            opt.first_step(zero_grad=True)
            with frozen_statistics(net) if form != "two calls" else contextlib.nullcontext():
                closure()
            opt.second_step()
        assert_same_bits(statistics(net), statistics(once), "statistic")


def test_the_only_pass_of_a_step_along_the_momentum_counts(backend: str) -> None:
    net, x = Normed(), images()
    twin = copy.deepcopy(net)
    opt = FusedSAM(net.parameters(), rho=RHO, direction="momentum", backend=backend, **HYPER)
    plain = FusedSAM(twin.parameters(), rho=RHO, direction="momentum", backend=backend, **HYPER)
    first_pass_only(net, opt)
    for _ in range(3):
        opt.step(loss_closure(net, x))
        plain.step(loss_closure(twin, x))
    assert_same_bits(statistics(net), statistics(twin), "statistics")
    assert net.bare.num_batches_tracked == 3


def test_in_pass_2_a_layer_called_on_its_own_is_frozen_too_until_remove(backend: str) -> None:
    """Not every training loop goes through the forward of the outermost module."""
    net, x = Normed(), images()
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, **HYPER)
    handle = first_pass_only(net, opt)
    for seen in (1, 3):
        opt.step(loss_closure(nn.Sequential(net.conv, net.inner), x))
        assert int(net.inner[0].num_batches_tracked) == seen
        handle.remove()


def test_a_forward_that_raises_in_pass_2_thaws(backend: str) -> None:
    net, x = Normed(), images()
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, **HYPER)
    first_pass_only(net, opt)

    def closure() -> Tensor:
        return loss_closure(net, x[:, :2] if opt.perturbed else x)()

    with pytest.raises(RuntimeError):
        opt.step(closure)
    seen = int(net.bare.num_batches_tracked)
    net(x)
    assert int(net.bare.num_batches_tracked) == seen + 1


def test_a_model_with_the_hooks_can_be_averaged(backend: str) -> None:
    """torch's weight averaging deep-copies the model, hooks included; the copy is not to be frozen."""
    net, x = Normed(), images()
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, **HYPER)
    first_pass_only(net, opt)
    average = torch.optim.swa_utils.AveragedModel(net)
    opt.step(loss_closure(net, x))
    average.update_parameters(net)
    torch.testing.assert_close(average.module.out.weight, net.out.weight)
    before = int(average.module.bare.num_batches_tracked)
    average(x)
    assert int(average.module.bare.num_batches_tracked) == before + 1
