"""Thread counts, instruction sets, forked children, Python threads: never a different bit, never a hang."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ADAM_CONFIGS,
    BLOCK,
    DTYPES,
    FEW_SIZES,
    PATIENCE,
    RHO,
    SGD_CONFIGS,
    SIXTEEN_BIT,
    AdamLists,
    Lists,
    adam_groups,
    ascent_groups,
    bits,
    gradient_stream,
    lacks_isa,
    set_grads,
    sgd_groups,
    snapshot,
)
from modes import MODES, dtype_of, optimizer_of

from fused_sam import FusedSAM, backends, ops
from fused_sam.ops import AscentGroup

ISAS = ["avx512", "avx2", "portable"]
SIZES = [*FEW_SIZES, 7, 33, 3 * BLOCK + 77]
needs_native = pytest.mark.skipif(backends.available().get("native") != "ok", reason="the native backend is not built")


def master_step(x: Lists, base: str, wide: bool, backend: str) -> list[list[torch.Tensor]]:
    """What a step on fp32 masters writes: w + e and w again, then all that an update does."""
    masters = [p.float() + 1e-6 for p in x.params]
    grads = [g.float() / 3 for g in x.grads] if wide else x.grads
    states = [[m.float().abs() for m in x.momentum] for _ in range(3)]
    journal: ops.Journal = []
    groups = ascent_groups(len(SIZES), adaptive=True)
    ascent = ops.Ascent(x.params, grads, groups, backend, 1.5 if wide else 2.0, masters)
    ascent.perturb(ascent.norm(), journal)
    seen = [[p.clone() for p in x.params]]
    ops.roll_back(journal)
    seen.append([p.clone() for p in x.params])
    if base == "sgd":
        config = sgd_groups(len(SIZES), **SGD_CONFIGS["nesterov-decay"])
        ops.sgd_update(x.params, grads, None, states[0], config, backend=backend, masters=masters)
    else:
        steps, config_ = [torch.tensor(6.0) for _ in SIZES], adam_groups(len(SIZES), **ADAM_CONFIGS["all-decoupled"])
        ops.adam_update(x.params, grads, None, *states, steps, config_, backend=backend, masters=masters)
    return [*seen, x.params, masters, *states]


Add = Callable[..., None]


def ascents(dtype: torch.dtype, fresh: Callable[[], Lists], add: Add, backend: str) -> None:
    for adaptive in (False, True):
        x, groups = fresh(), ascent_groups(len(SIZES), adaptive=adaptive)
        norm = ops.norm(x.params, x.grads, groups, backend=backend)
        add(f"norm {dtype} {adaptive}", [norm])
        ops.perturb(x.params, x.grads, x.backups, norm, groups, backend=backend)
        add(f"perturb {dtype} {adaptive}", x.params, x.backups)
    for p in (1.0, 1.5, 2.0, math.inf):
        x, groups = fresh(), [AscentGroup(len(SIZES), RHO, True, 0.03, 0.37)]
        norm = ops.norm(x.params, x.grads, groups, backend, p)
        ops.perturb(x.params, x.grads, x.backups, norm, groups, backend, p=p)
        add(f"perturb {dtype} p={p} eta decay", x.params, x.backups, [] if norm is None else [norm])


def descents(dtype: torch.dtype, fresh: Callable[[], Lists], add: Add, backend: str) -> None:
    for name in ("plain", "nesterov-decay", "maximize-all"):
        config = SGD_CONFIGS[name]
        for scale in (None, torch.tensor(3.0)):
            x, groups = fresh(), sgd_groups(len(SIZES), first=scale is None and name != "plain", **config)
            ops.sgd_update(x.params, x.grads, x.backups, x.momentum, groups, scale, backend=backend)
            add(f"sgd_update {dtype} {name} {scale}", x.params, x.momentum, x.grads)
    for weight, first in ((1 / 3, False), (0.5, False), (0.25, True)):
        x = fresh()
        ops.restore_accumulate(x.params, x.grads, [ops.AccumulateGroup(len(SIZES), weight, first)], backend=backend)
        add(f"restore_accumulate {dtype} {weight}", x.params)
    if dtype in SIXTEEN_BIT:
        for base, wide in itertools.product(("sgd", "adam"), (False, True)):
            add(f"{base} {dtype} masters, fp32 gradients: {wide}", *master_step(fresh(), base, wide, backend))
        x = fresh()
        grads, groups = [g.float() / 3 for g in x.grads], sgd_groups(len(SIZES), **SGD_CONFIGS["nesterov-decay"])
        ops.sgd_update(x.params, grads, x.backups, x.momentum, groups, torch.tensor(3.0), backend=backend)
        add(f"sgd_update {dtype} fp32 gradients", x.params, x.momentum, grads)
    for name in ("all", "decoupled"):
        y = AdamLists(SIZES, dtype, "cpu")
        y.states[1][-1][5] = y.states[2][-1][40] = float("nan")
        groups_ = adam_groups(len(SIZES), first=name == "decoupled", **ADAM_CONFIGS[name])
        y.update(groups_, grad_scale=torch.tensor(3.0), backend=backend)
        y.states[1][-1][5] = y.states[2][-1][40] = 0.0
        y.states[2][-1][5] = y.params[-1][5] = y.params[-1][40] = 0.0  # NaN has many bits
        add(f"adam_update {dtype} {name}", y.params, *y.states, y.grads)


def digests(threads: int, backend: str = "native") -> dict[str, str]:
    """A checksum of everything that each op writes, by op, dtype and variant."""
    torch.manual_seed(5)
    torch.set_num_threads(threads)
    found: dict[str, str] = {}

    def add(name: str, *written: list[torch.Tensor]) -> None:
        found[name] = hashlib.sha256(b"".join(bits(t) for tensors in written for t in tensors)).hexdigest()

    for dtype in DTYPES:
        lists = Lists(SIZES, dtype, "cpu")
        contents = [c.buffer.clone() for c in lists.carved]

        def fresh(lists: Lists = lists, contents: list[torch.Tensor] = contents) -> Lists:
            for carved, content in zip(lists.carved, contents, strict=True):
                carved.buffer.copy_(content)
            return lists

        ascents(dtype, fresh, add, backend)
        descents(dtype, fresh, add, backend)
    return found


@pytest.fixture(scope="module")
def default_digests() -> dict[str, str]:
    return digests(1)


@pytest.fixture(scope="module")
def digests_by_isa() -> dict[str, Any]:
    """Both thread counts in one fresh process for each instruction set, since the choice is made once."""
    script = "import json, test_threads; print(json.dumps([test_threads.digests(n) for n in (1, 2)]))"
    processes = {
        isa: subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env=os.environ | {"FUSED_SAM_CPU_ISA": isa},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for isa in ISAS
    }
    outputs = {isa: (p.communicate(timeout=PATIENCE), p.returncode) for isa, p in processes.items()}
    return {isa: json.loads(out) if code == 0 else err for isa, ((out, err), code) in outputs.items()}


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_on_neither_instruction_set_nor_thread_count(
    isa: str, threads: int, digests_by_isa: dict[str, Any], default_digests: dict[str, str]
) -> None:
    if lacks_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    found = digests_by_isa[isa]
    assert isinstance(found, list), f"the process failed: {found}"
    different = [name for name, value in default_digests.items() if found[threads - 1][name] != value]
    assert not different


@pytest.mark.parametrize(
    ("mode", "base"),
    # Without second order, whose norm torch takes. A base reads and writes each element by itself.
    [(mode, ("SGD", "Adam")[i % 2]) for i, mode in enumerate(MODES) if mode != "second order"] + [("plain", "Adam")],
)
def test_run_to_run_and_across_thread_counts_a_trajectory_keeps_its_bits(
    mode: str, base: str, backend: str, device: str
) -> None:
    # In fp64, where no rounding hides the order of a sum.
    dtype = dtype_of(mode, torch.float32 if mode == "plain" else torch.float64)
    start = [torch.randn(n).to(device, dtype) for n in (*SIZES, 9 * BLOCK + 5)]
    stream = gradient_stream([p.shape for p in start], 3 * MODES[mode].get("ascent_steps", 1), dtype)
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        params = [p.clone() for p in start]
        opt = optimizer_of(params, mode, base, backend)
        gradients = (x for pair in stream for x in pair)
        for _ in range(3):
            while True:
                set_grads(params, next(gradients))
                if not opt.perturb_next:
                    break
                opt.first_step(zero_grad=True)
            opt.step()
        if opt.looksam_alpha is None:
            opt.step([functools.partial(set_grads, params, stream[i][0]) for i in (2, 0)])  # two batches
        results.append(snapshot(params))
    assert all(r == results[0] for r in results)


def test_python_threads_with_an_optimizer_each_do_not_disturb_one_another(backend: str, device: str) -> None:
    stream = gradient_stream([(2 * BLOCK + 3,), (67,)], 10, torch.float32)

    def train(results: list[Any]) -> None:
        torch.set_num_threads(2)
        params = [torch.ones(2 * BLOCK + 3, device=device), torch.ones(67, device=device)]
        opt = FusedSAM(params, rho=RHO, backend=backend, **SGD_CONFIGS["momentum-decay"])
        for first, second in stream:
            set_grads(params, first)
            opt.first_step(zero_grad=True)
            set_grads(params, second)
            opt.step()
        results.append(snapshot(params))

    alone: list[Any] = []
    train(alone)
    together: list[Any] = []
    workers = [threading.Thread(target=train, args=(together,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=PATIENCE)
        assert not worker.is_alive()
    assert together == alone * 3


@needs_native
def test_no_thread_spins_after_the_work_is_done() -> None:
    """A pool that burns a core between steps slows down the model it trains."""
    torch.set_num_threads(2)
    lists = Lists([40 * BLOCK], torch.float32, "cpu")
    for _ in range(3):
        norm = ops.norm(lists.params, lists.grads, ascent_groups(1), backend="native")
        ops.perturb(lists.params, lists.grads, lists.backups, norm, ascent_groups(1), backend="native")
    time.sleep(0.05)
    begin, before = time.monotonic(), time.process_time()
    time.sleep(0.4)
    # Of the process itself: what others do to a busy machine makes the sleep longer and this no larger.
    assert time.process_time() - before < (time.monotonic() - begin) / 4


# A parent that has used the kernels with two threads forks, as a DataLoader does. torch's own parallel loops
# would hang in the child, so values are compared as bytes of numpy arrays.
FORK_PROBE = """
import os, torch
from fused_sam import FusedSAM

torch.manual_seed(3)
torch.set_num_threads(2)
shapes = (1, 67, 16385, 300_007)
start = [torch.randn(n) for n in shapes]
grads = [[torch.randn(n) for n in shapes] for _ in range(4)]
runs = [[p.clone() for p in start] for _ in range(3)]
copies = [[[g.clone() for g in gs] for gs in grads] for _ in range(3)]

def train(k, zero_grad):
    params, gradients = runs[k], copies[k]
    opt = FusedSAM(params, rho=0.07, lr=0.13, momentum=0.87, backend="native")
    for first, second in (gradients[:2], gradients[2:]):
        for p in params:
            p.grad = first.pop(0)
        opt.first_step(zero_grad=zero_grad)
        for p in params:
            p.grad = second.pop(0)
        opt.step()
    return b"".join(p.numpy().tobytes() for p in params)

expected = train(0, True)
pid = os.fork()
if pid == 0:
    os._exit(0 if train(1, True) == train(2, False) == expected else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_steps_right_and_does_not_hang() -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORK_PROBE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail("a step in a forked child hangs")
    assert (out.strip(), process.returncode) == ("0", 0), err
