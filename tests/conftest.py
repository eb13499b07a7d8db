"""Seeds, and the backend and device every test runs on."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from emulated_tests import EMULATED
from ranks import Ranks

from fused_sam import backends
from fused_sam.ops import lists

# A backend and a device it serves. Where there is no GPU, one placeholder stands for all GPU targets.
CPU_TARGETS = [("native", "cpu"), ("eager", "cpu")]
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    # Slow: test_triton.py chooses which tests run so.
    import interpreter

    interpreter.repair()
    CPU_TARGETS.append(("triton", "cpu"))
if "PTX_TRITON" in os.environ:  # test_ptx.py: compiled, and run on the emulator
    CPU_TARGETS.append(("triton", "cpu"))
if EMULATED:  # test_ptx.py: the CUDA kernels, as nvcc compiles them
    from ptx.backend import BACKEND

    # Last: it must never be anybody's choice.
    backends.REGISTRY = (*backends.REGISTRY, BACKEND)
    CPU_TARGETS.append(("emulated", "cpu"))
CUDA_TARGETS = [("native", "cuda"), ("triton", "cuda"), ("eager", "cuda")]


# Without the module fused_sam._aten the core reads tensors through Python and DLPack. So do tests on the emulator, and
# of these files, which are about what is read, those of the CPU's kernels a second time.
THROUGH_DLPACK = pytest.param(("native", "cpu", "dlpack"), id="native-dlpack")
READING = {
    *("test_storage.py", "test_stale.py", "test_faults.py", "test_gradient_ownership.py", "test_use_gradients.py"),
    *("test_optimizer_contract.py", "test_ops_arguments.py", "test_leaks.py"),
}


def _targets() -> list[object]:
    if torch.cuda.is_available():
        gpu = [pytest.param(t, id="-".join(t), marks=pytest.mark.gpu) for t in CUDA_TARGETS]
        return [pytest.param(t, id="-".join(t)) for t in CPU_TARGETS] + gpu
    no_gpu = pytest.mark.skip(reason="torch sees no CUDA device")
    return [pytest.param(t, id="-".join(t)) for t in CPU_TARGETS] + [
        pytest.param(CUDA_TARGETS[0], id="cuda", marks=[no_gpu, pytest.mark.gpu])
    ]


TARGETS = _targets()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        twice = metafunc.definition.path.name in READING
        metafunc.parametrize("target", TARGETS + twice * [THROUGH_DLPACK], indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(backend, device); skipped with the backend's own reason where it does not work."""
    backend, device, *reader = request.param
    state = backends.available(device).get(backend, "not part of this build")
    if state != "ok":
        pytest.skip(f"backend {backend}: {state}")
    if backend != "emulated" and not reader:
        yield backend, device
        return
    from fused_sam import _native

    _native.read_through(None)
    yield backend, device
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each worker begin with its part of what takes long: at the end it would keep one core busy."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = iter([item for item in items if not item.get_closest_marker("slow")])
    total, workers = len(items), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items.clear()
    for k in range(workers):  # each begins with an equal stretch of the list
        begun = slow[k::workers]
        items += [*begun, *itertools.islice(quick, max(total * (k + 1) // workers - len(items) - len(begun), 0))]
    items += quick
