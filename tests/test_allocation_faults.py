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


CASES: list[tuple[type[torch.optim.Optimizer], str, str]] = [
    (torch.optim.SGD, "plain", "two calls"),
    (torch.optim.AdamW, "plain", "closure"),
    (torch.optim.AdamW, "masters", "closure"),
    (torch.optim.SGD, "plain", "micro-batches"),
    (torch.optim.SGD, "p=1.5, adaptive, decay", "closure"),
    (torch.optim.SGD, "three ascent steps", "closure"),
    (torch.optim.SGD, "clipping", "two calls"),
    (torch.optim.SGD, "LookSAM", "closure"),
    (torch.optim.AdamW, "MSAM", "closure"),
    (torch.optim.SGD, "telemetry", "closure"),
]


def check(shim: str, backend: str) -> None:
    """Runs where the shim is preloaded: for every n, a step whose n-th allocation fails, and then one that does not."""
    from modes import MODES
    from test_interrupts import ADAM, ALL_OR_NOTHING, Training

    faults = ctypes.CDLL(shim)
    # In eager masters that have been written stay written, and so do weights in a step that is not perturbed, as
    # LookSAM's second: docs/reliability.md.
    whole = backend in ALL_OR_NOTHING
    for base, mode, form in [case for case in CASES if whole or case[1] not in ("masters", "LookSAM")]:
        options = {**(ADAM if base is torch.optim.AdamW else {"lr": 0.13, "momentum": 0.87}), **MODES[mode]}
        straight = Training(base, options, form, backend, small=64)
        straight.step()  # LookSAM and MSAM begin with what it leaves
        trajectory = [(straight.weights, straight.state)]
        for _ in range(2):
            straight.step()
            trajectory.append((straight.weights, straight.state))
        n = failed = 0
        while True:
            training = Training(base, options, form, backend, small=64)
            training.step()
            faults.fused_sam_test_fail(n)
            try:
                training.step()
            except (MemoryError, RuntimeError):
                failed += 1
            reached = faults.fused_sam_test_asked() > n
            faults.fused_sam_test_fail(-1)
            training.opt.restore()
            is_made = training.weights == trajectory[1][0]
            assert training.weights == trajectory[is_made][0], f"{mode}, allocation {n}"
            if whole:
                assert training.state == trajectory[is_made][1], f"{mode}, allocation {n}"
                training.step()
                assert (training.weights, training.state) == trajectory[is_made + 1], f"{mode}, after allocation {n}"
            if not reached:
                break
            n += 1
        print(mode, failed)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faulty_memory.so"
    command = ["c++", "-shared", "-fPIC", "-O1", str(HERE / "faulty_memory.cpp"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("c++"), reason="needs Linux and c++")
@pytest.mark.parametrize("backend", ["native", *(["eager"] if "FUSED_SAM_SOAK" in os.environ else [])])
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
    failed = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(failed) >= len(CASES) - 2
    assert min(failed) > 1, done.stdout  # so many steps
