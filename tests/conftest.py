"""Seeds, and the backend and device every test runs on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ptx import build
from ranks import Ranks

from fused_sam import backends
from fused_sam.ops import lists

with contextlib.suppress(ImportError):  # where the native core is not built
    from interpreted import BACKEND as INTERPRETED

    from fused_sam import _native

    # Last: it must never be anybody's choice.
    backends.REGISTRY = (*backends.REGISTRY, INTERPRETED)

# A backend and a device it serves. Where there is no GPU, one placeholder stands for all GPU targets.
CPU_TARGETS = [("native", "cpu"), ("interpreted", "cpu"), ("eager", "cpu")]
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    # Slow: test_triton.py chooses which tests run so.
    import interpreter

    interpreter.repair()
    CPU_TARGETS.append(("triton", "cpu"))
if "PTX_TRITON" in os.environ:  # test_ptx.py: compiled, and run on the emulator
    CPU_TARGETS.append(("triton", "cpu"))
# Whole files of tests that test_ptx.py runs.
EMULATED = {
    *("test_ops.py", "test_ops_update.py", "test_ops_accumulate.py", "test_ops_adam.py", "test_ops_masters.py"),
    *("test_p_norms.py", "test_mixed_dtypes.py"),
}
CUDA_TARGETS = [("native", "cuda"), ("triton", "cuda"), ("eager", "cuda")]


def _targets() -> list[object]:
    if torch.cuda.is_available():
        gpu = [pytest.param(t, id="-".join(t), marks=pytest.mark.gpu) for t in CUDA_TARGETS]
        return [pytest.param(t, id="-".join(t)) for t in CPU_TARGETS] + gpu
    no_gpu = pytest.mark.skip(reason="torch sees no CUDA device")
    return [pytest.param(t, id="-".join(t)) for t in CPU_TARGETS] + [
        pytest.param(CUDA_TARGETS[0], id="cuda", marks=[no_gpu, pytest.mark.gpu])
    ]


@pytest.fixture(params=_targets())
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(backend, device); skipped with the backend's own reason where it does not work.

    The interpreted kernels' tests read tensors through Python and DLPack, and so does whoever has no ATen extension.
    """
    backend, device = request.param
    state = backends.available(device).get(backend, "not part of this build")
    if state != "ok":
        pytest.skip(f"backend {backend}: {state}")
    if backend == "interpreted":
        _native.read_through(None)
    yield request.param
    if backend == "interpreted":
        lists.read_through_aten()


@pytest.fixture
def backend(target: tuple[str, str]) -> str:
    return target[0]


@pytest.fixture
def device(target: tuple[str, str]) -> str:
    return target[1]


@pytest.fixture
def ieee_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor.sqrt rounded correctly on the CPU, where torch's is MKL's: one ulp off for one fp32 number in five.

    It is the one operation of torch.optim.Adam's for-loop that the kernels do not share.
    """
    torchs = torch.Tensor.sqrt

    def sqrt(x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return torchs(x)
        return torch.as_tensor(np.asarray(np.sqrt(x.detach().numpy())))

    monkeypatch.setattr(torch.Tensor, "sqrt", sqrt)


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two processes for as long as there are tests."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four processes for as long as there are tests."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed for every test, and torch's process-wide settings as they were before it.

    One thread unless a test asks for more: networks of a few weights are many times slower on a busy machine
    otherwise. Results do not depend on it, which is what test_threads.py is for.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    # Not torch.manual_seed: without a GPU it keeps a stack trace of each call, which takes longer than most tests.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    torch.set_num_threads(1)
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes long: at the end of a run it would keep one core busy while the others wait.

    In a run of all tests the CUDA kernels take those of the ops on the emulator, and not on the host as well.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    whole = any(item.path.name == "test_ptx.py" for item in items)
    if not whole or "PTX_EMULATOR" in os.environ or build.why_not() is not None:
        return
    twice = [item for item in items if item.path.name in EMULATED and "interpreted-cpu" in item.nodeid]
    config.hook.pytest_deselected(items=twice)
    kept = set(items).difference(twice)
    items[:] = [item for item in items if item in kept]
