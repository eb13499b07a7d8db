"""Every allocation of a step fails once: of the native core, and of the memory of a tensor."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_sam import backends

HERE = Path(__file__).parent


def check(shim: str, backend: str) -> None:
    """Runs where the shim is preloaded: for every n, a step whose n-th allocation fails, and then one that does not."""
    from test_interrupts import ADAM, Training

    faults = ctypes.CDLL(shim)
    failed = 0
    for base, options, form in (
        (torch.optim.SGD, {"lr": 0.13, "momentum": 0.87}, "two calls"),
        (torch.optim.AdamW, ADAM, "closure"),
    ):
        straight = Training(base, options, form, backend, small=64)
        trajectory = [(straight.weights, straight.state)]
        for _ in range(2):
            straight.step()
            trajectory.append((straight.weights, straight.state))
        n = 0
        while True:
            training = Training(base, options, form, backend, small=64)
            faults.fused_sam_test_fail(n)
            try:
                training.step()
            except (MemoryError, RuntimeError):
                failed += 1
            reached = faults.fused_sam_test_asked() > n
            faults.fused_sam_test_fail(-1)
            training.opt.restore()
            is_made = training.weights == trajectory[1][0]
            assert (training.weights, training.state) == trajectory[is_made], f"allocation {n}"
            training.step()
            assert (training.weights, training.state) == trajectory[is_made + 1], f"after allocation {n}"
            if not reached:
                break
            n += 1
    print(failed)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faulty_memory.so"
    command = ["c++", "-shared", "-fPIC", "-O1", str(HERE / "faulty_memory.cpp"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("c++"), reason="needs Linux and c++")
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_an_allocation_that_fails_leaves_the_step_made_or_not_made(backend: str, shim: Path) -> None:
    if backends.available().get(backend) != "ok":
        pytest.skip(f"the {backend} backend is not built")
    done = subprocess.run(
        [sys.executable, "-c", f"import test_allocation_faults as t; t.check({str(shim)!r}, {backend!r})"],
        cwd=HERE,
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10  # so many steps failed
