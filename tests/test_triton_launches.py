"""Real calls of the Triton backend, with a driver that names a GPU but launches nothing."""

from __future__ import annotations

import subprocess
import sys

from triton_tests import compiled, needs_triton

COUNTING = """
import functools, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Driver())
launches = []

def compile_only(self, grid):
    launches.append(self.fn.__name__)
    return functools.partial(self.run, grid=grid, warmup=True)

JITFunction.__getitem__ = compile_only
from fused_sam import FusedSAM
from fused_sam.backends import triton
triton.why_not = lambda device_type: None

def variants():
    caches = [cache[0] for n in triton.kernels.__all__ for cache in getattr(triton.kernels, n).device_caches.values()]
    return sum(map(len, caches))

buffer = torch.randn(40000)
params = [buffer[1:2], buffer[2:19], buffer[32:20000], buffer[20001:36385]]
options = {"backend": "triton", "rho": 0.05, "lr": 0.1, "adaptive": True}
sgd = FusedSAM(params, momentum=0.9, **options)
adam = FusedSAM(params, torch.optim.AdamW, p=1, **options)

def step(optimizer):
    launches.clear()
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.randn(p.numel() + 1)[1:] if half == optimizer.first_step else torch.randn_like(p)
        half(zero_grad=True)
    print(*launches)

step(sgd)
step(adam)
before = variants()
group = sgd.param_groups[0]
for values in (
    {"lr": 1}, {"lr": 16.0, "rho": 1.0}, {"rho": 0.0}, {"momentum": 0.5, "nesterov": True}, {"weight_decay": 0.1},
    {"adaptive": False}, {"maximize": True}, {"momentum": 0.0, "nesterov": False},
):
    group.update(values)
    step(sgd)
group = adam.param_groups[0]
for values in (
    {"lr": 1}, {"lr": 16.0, "rho": 1.0}, {"betas": (0.3, 0.5)}, {"eps": 1.0, "weight_decay": 0.0}, {"adaptive": False},
    {"maximize": True, "decoupled_weight_decay": False},
):
    group.update(values)
    step(adam)
for optimizer in (sgd, adam):
    optimizer.add_param_group({"params": [torch.randn(16)], "lr": 0.3})
params.append(sgd.param_groups[1]["params"][0])
adam.param_groups[1]["params"] = params[-1:]
step(sgd)
step(adam)
print(before, variants())
adam.p = 1.5
step(adam)

def closure():
    for p in params:
        p.grad = torch.randn_like(p)

options.pop("adaptive")
msam = FusedSAM(params, momentum=0.9, direction="momentum", **options)
msam.step(closure)
launches.clear()
msam.step(closure)
print(*launches)
launches.clear()
sgd.step([closure] * 3)
print(*launches)
"""


@needs_triton
@compiled
def test_few_launches_and_nothing_compiled_anew() -> None:
    """Whatever changes: lr, rho, step, flags, sizes, how many tensors, the addresses and alignment of gradients."""
    done = subprocess.run([sys.executable, "-c", COUNTING], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *steps, variants, powers, msam, micro_batches = done.stdout.splitlines()
    assert len(steps) == 18
    assert set(steps) == {
        "norm_partials norm_total perturb sgd_update",
        "peak_partials peak_total perturb adam_update",
    }
    assert variants == "8 8"
    assert powers == "adam_update"  # the ascent runs in torch operations
    assert msam == "norm_partials norm_total perturb sgd_update"
    once = "norm_partials norm_total perturb restore_accumulate"
    assert micro_batches == f"{once} {once} {once} sgd_update"
