"""The environment, the state of each backend, and one checked step on each that works."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import torch

from fused_sam import FusedSAM, ReferenceSAM, __version__, backends
from fused_sam.ops import lists

# In units of fp32 rounding at weights of about 1: one perturbation and one update, with room for neither to be wrong.
TOLERANCE = 8 * torch.finfo(torch.float32).eps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if a backend that loads makes no step or a wrong one, or the one asked for is not usable."""
    for name, value in environment().items():
        print(f"{name:<12} {value}")
    print()
    failures = sum(report(device) for device in devices())
    try:
        asked = backends.requested()
        if asked and all(backends.available(device)[asked] != "ok" for device in devices()):
            backends.for_device(devices()[-1], asked)
    except (RuntimeError, ValueError) as error:
        print(error)
        failures += 1
    return 1 if failures else 0


def devices() -> list[str]:
    """Return the types of this machine's devices."""
    return ["cpu", *(kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available())]


def report(device: str) -> int:
    """Print what each backend does with tensors of a device type, and which is used unasked; the number of failures."""
    failures = 0
    for name, state in backends.available(device).items():
        if state == "ok":
            ok, state = check(name, device)
            failures += not ok
        print(f"{device:<6}{name:<12} {state}")
    asked = os.environ.get("FUSED_SAM_BACKEND")
    first = next((name for name, state in backends.available(device).items() if state == "ok"), "none")
    usable = backends.available(device).get(asked or "") == "ok"
    print(f"{device:<6}in use: {f'{asked} (FUSED_SAM_BACKEND)' if usable else first}\n")
    return failures


def check(backend: str, device: str) -> tuple[bool, str]:
    """Return whether one step on a backend is right, and what there is to say of it."""
    try:
        error = step_error(backend, device)
    except Exception as raised:
        return False, f"FAILED: {type(raised).__name__}: {' '.join(str(raised).split())}"
    ok = error <= TOLERANCE
    return ok, f"ok, one step checked: largest error {error:.1e}" if ok else f"WRONG: error {error:.1e}"


def environment() -> dict[str, str]:
    """Return what a bug report needs."""
    facts = {
        "fused_sam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": str(torch.get_num_threads()),
        "cuda": f"{torch.version.cuda or 'none'}, {torch.cuda.device_count()} devices",
    }
    for index in range(torch.cuda.device_count()):
        facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if backends.available()["native"] == "ok":
        from fused_sam import _native

        facts["kernels"] = f"{_native.isa()}; CUDA: {_native.cuda.architectures() or 'not built'}"
        facts["tensors"] = "read through ATen"
        if lists.why_not_aten is not None:
            facts["tensors"] = f"read through Python and DLPack, which takes longer: {lists.why_not_aten}"
    return facts


def step_error(backend: str, device: str = "cpu") -> float:
    """Return the largest deviation of weights from the float64 reference after one SAM step on made-up gradients."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(device) for shape in [(257, 129), (16385,), (3, 5, 7), (1,)]]

    weights, gradients = tensors(), [tensors(), tensors()]
    options: dict[str, Any] = {"rho": 0.05, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    params = [w.to(device, copy=True).requires_grad_() for w in weights]
    exact = [w.double() for w in weights]
    ours, reference = FusedSAM(params, **{**options, "backend": backend}), ReferenceSAM(exact, **options)
    for optimizer, ps, dtype in ((ours, params, torch.float32), (reference, exact, torch.float64)):
        for grads, half in zip(gradients, (optimizer.first_step, optimizer.second_step)):
            for p, g in zip(ps, grads):
                p.grad = g.to(p.device, dtype, copy=True)
            half(zero_grad=True)
    return max((p.cpu().double() - q).abs().max().item() for p, q in zip(params, exact))
