"""Memory over many steps, with every option and base: none is kept, and what is dropped is collected."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import set_grads
from modes import COMBINED, after, every_mode, make, step

from fused_sam import backends

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # create_graph, in second order
STEPS = 100


def resident() -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def growth(backend: str) -> dict[str, int]:
    """KiB by which the steps of each combination have let the process grow, one of ten of them with an exception."""
    torch.set_num_threads(1)
    found = {}

    def fail() -> None:
        raise KeyError

    for mode, base in (x.values for x in COMBINED):
        opt = make(str(mode), str(base), backend, "cpu", large=300)
        begin, steps = 0, int(os.environ.get("FUSED_SAM_SOAK", STEPS)) if mode == "plain" else STEPS
        for i in range(steps + 50):
            if i == 50:
                gc.collect()
                begin = resident()
            step(opt, 1 if opt.looksam_alpha else 1 + i % 2)
            if i % 10 == 0:
                try:
                    step(opt, before=fail)
                except KeyError:
                    opt.zero_grad()
        gc.collect()
        found[f"{base}-{mode}"] = resident() - begin
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_no_option_lets_the_process_grow(backend: str) -> None:
    """A leak of 4 KiB in a step shows. What the backends have in common is seen with one of them."""
    if backend != "native" and "FUSED_SAM_SOAK" not in os.environ:
        pytest.skip("make soak")
    if backends.available("cpu").get(backend, "not part of this build") != "ok":
        pytest.skip(f"the {backend} backend is not built")
    script = f"import conftest, json, test_leaks as t; print(json.dumps(t.growth({backend!r})))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(COMBINED)
    assert not {name: kib for name, kib in found.items() if kib >= 4 * STEPS}


@pytest.fixture
def _quick_collection() -> Iterator[None]:
    """What is there already, all of torch, is not looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@every_mode
@pytest.mark.usefixtures("_quick_collection")
def test_optimizer_and_parameters_are_collected_when_dropped(mode: str, base: str, backend: str, device: str) -> None:
    opt = make(mode, base, backend, device)
    params = opt.param_groups[0]["params"]
    dead = [weakref.ref(x) for x in (opt, *params)]
    after(opt, 3)
    if opt.perturb_next and not opt.second_order:  # also in the middle of a step
        set_grads(params, [torch.ones(x.shape) for x in params])
        opt.first_step(zero_grad=True)
    del opt, params
    gc.collect()
    assert [x() for x in dead] == [None] * len(dead)
