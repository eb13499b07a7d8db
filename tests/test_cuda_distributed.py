"""One rank with NCCL: buckets, shares and collectives on the device give the bits of an optimizer alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO, assert_same_bits, snapshot
from rank_oracle import WRAPS, joined, wrapped
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

from fused_sam import FusedSAM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base_optimizer": SGD, **HYPER},
    "adam": {"base_optimizer": Adam, "lr": 0.013, "fused": True},
}
SMALL = 0.01  # MiB: several buckets


class Elementwise(nn.Module):
    """Gradients by elementwise operations alone, which come out the same in every run; two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 3, 7, 7), (64,), (), (181, 33), (7,), (1009,)]
        self.ps = nn.ParameterList([torch.randn(s, generator=generator).cuda() for s in shapes])
        self.ps.append(torch.randn(63, generator=generator).cuda().bfloat16())
        self.ps.append(torch.randn(2, 8, 5, 5, generator=generator).cuda().to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(p * p * x.to(p)).sum().float() for p in self.ps]).sum()


def closure_of(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = model(x)
        loss.backward()
        return loss

    return closure


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not dist.is_nccl_available():
        pytest.skip("torch without NCCL")
    store: Path = tmp_path_factory.mktemp("nccl") / "store"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", f"file://{store}", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def options(wrap: str) -> dict[str, Any]:
    return {} if wrap == "ddp" else {"bucket_cap_mb": SMALL}


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", ["rank", "world"])
def test_one_rank_steps_as_an_optimizer_alone(wrap: str, base: str, m: str) -> None:
    net, twin = Elementwise(), Elementwise()
    opt, alone = (FusedSAM(n.parameters(), rho=RHO, **BASES[base]) for n in (net, twin))
    model = wrapped(net, wrap)
    handle = joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1, **options(wrap))
    for step in range(4):
        x = torch.tensor(0.3 + step, device="cuda")
        for optimizer, m_ in ((opt, model), (alone, twin)):
            closure = closure_of(m_, x)
            optimizer.step([closure, closure_of(m_, 2 * x)] if step == 2 else closure)
        assert_same_bits(net.parameters(), twin.parameters(), f"parameter after step {step}, number")
    state: Any = handle.consolidate_state_dict() if wrap == "sharded" else opt.state_dict()
    for number, expected in alone.state_dict()["state"].items():
        assert_same_bits(state["state"][number].values(), expected.values(), "state")
    handle.remove()
    for optimizer, m_ in ((opt, net), (alone, twin)):
        optimizer.step(closure_of(m_, torch.tensor(0.7, device="cuda")))
    assert_same_bits(net.parameters(), twin.parameters(), "parameter after remove(), number")


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("wrap", ["plain", "sharded"])
def test_an_overflow_is_seen_by_the_scaler(wrap: str) -> None:
    net = Elementwise()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    joined(net, opt, wrap, **options(wrap))
    scaler, scales = GradScaler("cuda", init_scale=2.0**8), []
    for step in range(3):
        before = snapshot(net.parameters())
        scaler.scale(net(torch.tensor(0.3, device="cuda"))).backward()
        opt.first_step(zero_grad=True)
        factor = math.inf if step == 1 else 1.0
        (scaler.scale(net(torch.tensor(0.3, device="cuda"))) * factor).backward()
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        opt.zero_grad()
        assert (snapshot(net.parameters()) == before) == (step == 1)
    assert scales == [2.0**8, 2.0**7, 2.0**7]
