"""``python -m fused_sam``: the environment, the state of each backend, and one checked step on each that works."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

import torch

from fused_sam import FusedSAM, ReferenceSAM, __version__, backends

# In units of fp32 rounding at weights of about 1: one perturbation and one update, with room for neither to be wrong.
TOLERANCE = 8 * torch.finfo(torch.float32).eps


def main(argv: list[str] | None = None) -> int:
    """Print the report; 1 if a backend that loads computes a wrong step, or the one asked for is not usable."""
    parser = argparse.ArgumentParser(prog="python -m fused_sam", description=__doc__)
    parser.parse_args(argv)
    for name, value in environment().items():
        print(f"{name:<12} {value}")
    print()
    failures = 0
    for name, state in backends.available().items():
        device = _device_for(name)
        if device is None:
            state = backends.available("cpu")[name]
        else:
            error = step_error(name, device)
            ok = error <= TOLERANCE
            failures += not ok
            state = f"ok, one step checked: largest error {error:.1e}" if ok else f"WRONG: error {error:.1e}"
        print(f"{name:<12} {state}")
    try:
        asked = backends.requested()
        for device in [_device_for(asked) or "cpu"] if asked else _devices():
            chosen = backends.for_device(device, asked).__name__.rpartition(".")[2]
            print(f"\nIn use for {device.upper()} tensors: {chosen}{' (FUSED_SAM_BACKEND)' if asked else ''}")
    except (RuntimeError, ValueError) as error:
        print(f"\n{error}")
        failures += 1
    return 1 if failures else 0


def _devices() -> list[str]:
    return ["cpu", *(kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available())]


def _device_for(backend: str) -> str | None:
    """The type of a device that is here and that the backend takes."""
    return next((device for device in _devices() if backends.available(device)[backend] == "ok"), None)


def environment() -> dict[str, str]:
    """What a bug report needs."""
    facts = {
        "fused_sam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": str(torch.get_num_threads()),
        "cuda": f"{torch.version.cuda or 'none'}, {torch.cuda.device_count()} devices",
    }
    if backends.available()["native"] == "ok":
        from fused_sam import _native

        facts["kernels"] = _native.isa()
    return facts


def step_error(backend: str, device: str = "cpu") -> float:
    """Largest deviation of the weights from the float64 reference after one SAM step on made-up gradients."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) for shape in [(257, 129), (16385,), (3, 5, 7), (1,)]]

    weights, gradients = tensors(), [tensors(), tensors()]
    options: dict[str, Any] = {"rho": 0.05, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    params = [w.to(device, copy=True).requires_grad_() for w in weights]
    exact = [w.double() for w in weights]
    ours, reference = FusedSAM(params, backend=backend, **options), ReferenceSAM(exact, **options)
    for optimizer, ps, dtype in ((ours, params, torch.float32), (reference, exact, torch.float64)):
        for grads, half in zip(gradients, (optimizer.first_step, optimizer.second_step)):
            for p, g in zip(ps, grads):
                p.grad = g.to(p.device, dtype, copy=True)
            half(zero_grad=True)
    return max((p.cpu().double() - q).abs().max().item() for p, q in zip(params, exact))


if __name__ == "__main__":
    sys.exit(main())
