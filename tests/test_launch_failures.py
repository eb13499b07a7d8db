"""Launches that fail: said by the call that made them, and nothing is left displaced."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits, snapshot

from fused_sam import FusedSAM, backends

if backends.available()["native"] != "ok":
    pytest.skip("the native core is not built", allow_module_level=True)

from fused_sam import _native
from fused_sam.backends import native

HERE = Path(__file__).parent
SIZES = [1 + k % 5 for k in range(2500)] + [3000] * 3  # three launches an op; the last ones hold w in their gradients


@pytest.fixture(autouse=True)
def _launches_succeed_again() -> Any:
    yield
    _native.cuda.fail_on_host(-1)


def optimizer_of(params: list[torch.Tensor]) -> FusedSAM:
    return FusedSAM(params, rho=0.3, lr=0.1, momentum=0.9, weight_decay=0.01, backend="interpreted")


def with_gradients(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    params = [torch.randn(n, requires_grad=True) for n in SIZES]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("good", range(7))
def test_an_ascent_that_fails_in_any_launch_displaces_nothing(good: int, zero_grad: bool) -> None:
    """Three launches are the norm's and three perturb's, so that six good ones are all."""
    params = with_gradients(0)
    optimizer, before = optimizer_of(params), snapshot(params)
    gradients = snapshot([p.grad for p in params])
    _native.cuda.fail_on_host(good)
    if good == 6:
        optimizer.first_step(zero_grad)
        assert optimizer.perturbed
        return
    with pytest.raises(RuntimeError, match="CUDA error"):
        optimizer.first_step(zero_grad)
    assert snapshot(params) == before
    assert not optimizer.perturbed
    if not zero_grad or good <= 3:  # else some gradients have held w
        assert snapshot([p.grad for p in params]) == gradients
    # The step after it is that of an optimizer to which nothing has happened.
    stepped = []
    for params_, optimizer_ in ((params, optimizer), ((fresh := with_gradients(0)), optimizer_of(fresh))):
        for half in (optimizer_.first_step, optimizer_.second_step):
            for k, p in enumerate(params_):
                p.grad = torch.full_like(p, 0.01 * (k % 13) - 0.05)
            half(zero_grad=True)
        stepped.append(snapshot(params_))
    assert stepped[0] == stepped[1]


@pytest.mark.parametrize("good", range(3))
def test_weights_are_back_at_w_where_an_update_fails(good: int) -> None:
    params = with_gradients(1)
    optimizer, before = optimizer_of(params), snapshot(params)
    optimizer.first_step(zero_grad=True)
    for p in params:
        p.grad = torch.randn_like(p)
    _native.cuda.fail_on_host(good)
    with pytest.raises(RuntimeError, match="CUDA error"):
        optimizer.second_step()
    assert snapshot(params) == before
    assert not optimizer.perturbed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_an_error_of_the_runtime_is_that_of_the_call_that_made_it(tmp_path: Path) -> None:
    program = tmp_path / "harness"
    sources = [
        HERE / "launches" / "harness.cu",
        HERE / "launches" / "runtime.cpp",
        HERE.parent / "csrc/cuda/work_list.cpp",
    ]
    build = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-cudart=none", "-arch=sm_90", *sources, "-o", program]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "ok\n"


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number


def test_backups_are_kept_for_the_stream_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else memory would go back to the stream of the ascent while that of the update reads it."""
    recorded: list[tuple[int, int]] = []
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda x, stream: recorded.append((x.data_ptr(), stream.cuda_stream)),
        raising=False,
    )
    streams = iter([Stream(7), Stream(7), Stream(8)])
    monkeypatch.setattr(native, "current_stream", lambda device: next(streams))
    monkeypatch.setattr(native, "is_on_host", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    params = [torch.randn(n) for n in (5, 3000)]
    before = bits(params[0]), bits(params[1])
    grads = [torch.randn_like(p) for p in params]
    ascent = native.Batch(True, params, grads, None)
    ascent.make_backups(owned=False)
    ascent.perturb(torch.tensor(2.0, dtype=torch.float64), [native.AscentGroup(2, 0.3, False)], 2.0, [])
    assert recorded == []
    ascent.restore()
    assert sorted(recorded) == sorted((memory.data_ptr(), 8) for memory in ascent.core.memory)
    assert recorded != []
    assert (bits(params[0]), bits(params[1])) == before
