"""The Triton backend where there is no GPU: what is true of it alone, in Triton's interpreter, and its host side.

The tests that all backends share run on what Triton compiles: on the emulator (test_ptx.py), or on a GPU.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
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
    AdamLists,
    adam_groups,
    ascent_groups,
    bits,
    ids,
    set_grads,
    snapshot,
)
from triton_tests import compiled, interpreted, needs_triton

from fused_sam import FusedSAM, backends, ops


@needs_triton
@compiled
@pytest.mark.slow
def test_what_is_about_triton_alone_passes_in_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "test_triton.py")]
    command += [str(here / "test_triton_chunks.py")]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=here.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 20


@interpreted
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_bits_of_the_norm_do_not_depend_on_alignment(dtype: torch.dtype, adaptive: bool) -> None:
    """In vectors or one by one, an element is added to the same sum in the same order."""
    size = BLOCK + 2053
    values = [torch.randn(size).to(dtype) for _ in range(2)]
    norms = set()
    for offset in (0, 1):
        w, g = (torch.zeros(size + 16, dtype=dtype)[offset : offset + size].copy_(v) for v in values)
        norms.add(ops.norm([w], [g], ascent_groups(1, adaptive=adaptive), backend="triton").item())
    assert len(norms) == 1


@interpreted
def test_p_1_finds_the_first_of_the_largest_in_every_chunk_and_launch() -> None:
    """A launch for each pair of dtypes: the chunks of the third tensor come before those of the second."""
    params = [torch.zeros(9), torch.zeros(BLOCK + 1).bfloat16(), torch.zeros(BLOCK + 1)]

    def norm(*values: tuple[int, int, float]) -> list[float]:
        grads = [torch.full_like(w, -0.5) for w in params]
        for tensor, element, value in values:
            grads[tensor][element] = value
        return ops.norm(params, grads, ascent_groups(3), backend="triton", p=1).tolist()

    assert norm((2, 3, 5.0), (1, BLOCK, -5.0), (2, 1, 5.0)) == [5.0, 1.0, BLOCK]
    assert norm((2, BLOCK, 5.0), (2, 9000, 5.0), (2, 8999, -5.0)) == [5.0, 2.0, 8999.0]
    assert norm() == [0.5, 0.0, 0.0]
    value, *place = norm((0, 1, math.inf), (1, 8200, math.nan), (2, 0, math.nan))
    assert math.isnan(value)
    assert place == [1.0, 8200.0]
    assert norm((0, 8, math.inf), (1, 3, 3e38)) == [math.inf, 0.0, 8.0]


@interpreted
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_adam_has_the_bits_of_the_native_kernels(dtype: torch.dtype, capturable: bool) -> None:
    for k, config in enumerate(ADAM_CONFIGS.values()):
        results = []
        for backend in ("native", "triton"):
            torch.manual_seed(0)
            lists = AdamLists(FEW_SIZES[:-1], dtype, "cpu", steps=7.0**k)
            groups = adam_groups(len(lists.params), **config)
            lists.update(groups, backend=backend, capturable=capturable)
            results.append([snapshot(x) for x in (lists.params, *lists.states, lists.steps)])
        assert results[0] == results[1]


@interpreted
@pytest.mark.parametrize("layouts", ["dense", "strided"])
@pytest.mark.parametrize("p", [1.5, 3.0])
def test_other_p_run_in_torch_operations(p: float, layouts: str) -> None:
    """w + e has the bits of the eager backend, and the update brings back what torch has moved, bit for bit."""
    shapes = [(2000,), (5, 3), (40, 2) if layouts == "strided" else (40,)]
    start = [torch.randn(shape) for shape in shapes]
    start[1] = start[1].bfloat16()
    moved = []
    for backend in ("triton", "eager"):
        params = [w.clone()[:, 0] if w.shape == (40, 2) else w.clone() for w in start]
        before = snapshot(params)
        optimizer = FusedSAM(params, rho=0.3, lr=0.0, momentum=0.9, p=p, adaptive=True, backend=backend)
        set_grads(params, [torch.cos(w.float()).to(w.dtype) for w in params])
        optimizer.first_step(zero_grad=True)
        moved.append(snapshot(params))
        set_grads(params, [torch.ones_like(w) for w in params])
        optimizer.second_step(zero_grad=True)
        assert snapshot(params) == before

        def closure(params: list[torch.Tensor] = params) -> None:
            set_grads(params, [torch.ones_like(w) for w in params])

        optimizer.step([closure] * 2)
        assert snapshot(params) == before
    assert moved[0] == moved[1] != before


@interpreted
@pytest.mark.parametrize("launched", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("mishap", [KeyboardInterrupt, RuntimeError])
def test_what_was_moved_comes_back_if_a_launch_is_interrupted(
    mishap: type[BaseException], number: int, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters of two dtypes are two launches: Ctrl-C before or right after one, or code that cannot be compiled."""
    from fused_sam.backends.triton import kernels

    class Interrupted:
        kernel = kernels.perturb
        arg_names = kernels.perturb.arg_names
        launches = 0

        def __getitem__(self, grid: Any) -> Any:
            self.launches += 1
            return self.launch if self.launches == number else self.kernel[grid]

        def launch(self, *arguments: Any, **constants: Any) -> None:
            if launched:
                self.kernel[(1,)](*arguments, **constants)
            raise mishap

    monkeypatch.setattr(kernels, "perturb", interrupted := Interrupted())
    params = [torch.randn(2000), torch.randn(2000).bfloat16()]
    grads = [torch.ones_like(w) for w in params]
    before = snapshot(params)
    optimizer = FusedSAM(params, rho=0.3, lr=0.1, backend="triton")
    set_grads(params, grads)
    with pytest.raises(mishap):
        optimizer.first_step(zero_grad=True)
    assert interrupted.launches == number
    assert not optimizer.perturbed
    assert snapshot(params) == before
    if number == 1 and not launched:  # else the memory of the gradients has held w
        assert [bits(w.grad) for w in params] == snapshot(grads)


@needs_triton
def test_what_a_graph_captured_is_sent_by_the_graph_and_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has no streams: made up, like memory that a capture may not ask for."""
    from types import SimpleNamespace

    from fused_sam.backends.triton import tables

    state = SimpleNamespace(stream=7, capturing=False)
    streams = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(stream_id=state.stream),
        is_current_stream_capturing=lambda: state.capturing,
    )
    monkeypatch.setattr(tables.torch, "get_device_module", lambda device: streams)
    empty = torch.empty
    monkeypatch.setattr(tables.torch, "empty", lambda *size, pin_memory, **kind: empty(*size, **kind))
    columns, device, numbers = tables.Columns(), torch.device("meta"), [tables.column([1, 2, 3])]
    before = columns.on(device, numbers)[0]
    assert columns.on(device, numbers)[0] is before
    state.capturing = True
    monkeypatch.setattr(tables.torch, "empty", None)
    one, two = (columns.on(device, numbers)[0] for _ in range(2))
    assert len({id(before), id(one), id(two)}) == 3
    assert [pinned.tolist() for pinned, _ in columns._captured] == [[1, 2, 3]] * 2
    state.capturing = False
    assert columns.on(device, numbers)[0] is before
    monkeypatch.setattr(tables.torch, "empty", lambda *size, pin_memory, **kind: empty(*size, **kind))
    state.stream = 8
    assert columns.on(device, numbers)[0] is not before


@needs_triton
def test_the_plan_covers_every_element_once_whatever_the_dtypes() -> None:
    from fused_sam.backends.triton import kernels, tables

    f32, bf16 = (torch.float32, torch.float32), (torch.bfloat16, torch.float32)
    sizes = (1, 0, kernels.CHUNK, kernels.CHUNK + 1, 5, 3 * kernels.CHUNK - 1)
    kinds = (0, 0, 2 << 2, 0, -1, 2 << 2)
    plan = tables.plan(tables.column(kinds), tables.column(sizes), (2, 4))
    entries = memoryview(plan.chunks).cast("q").tolist()
    assert [(e >> 32, e & 0xFFFFFFFF) for e in entries] == [(0, 0), (3, 0), (3, 1), (2, 0), (5, 0), (5, 1), (5, 2)]
    assert [(x.dtypes, x.first, x.programs) for x in plan.launches] == [(f32, 0, 3), (bf16, 3, 4)]
    assert memoryview(plan.groups).cast("q").tolist() == [0, 0, 1, 1, 1, 1]


# What it needs: why it is not available, and what to do.
NEEDED = {
    "triton": ("Triton is not installed", "pip install triton"),
    "fused_sam._native": (
        "the native core, which reads tensors for the Triton kernels, does not load",
        "reinstall where a C++17 compiler is found: FUSED_SAM_NATIVE=ON pip",
    ),
}


@pytest.mark.parametrize("module", ["triton", pytest.param("fused_sam._native", marks=needs_triton)])
def test_without_what_it_needs_the_backend_says_so(module: str) -> None:
    code = (
        f"import sys, torch; sys.modules[{module!r}] = None\n"
        "from fused_sam import FusedSAM, backends\n"
        "print(backends.available('cuda')['triton'])\n"
        "print(backends.for_device('cuda').__name__)\n"
        "try: FusedSAM([torch.zeros(1)], backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    state, chosen, refusal = done.stdout.splitlines()
    reason, remedy = NEEDED[module]
    assert state.startswith(f"{reason} (to get it: {remedy}")
    assert chosen == "fused_sam.backends.eager"
    assert refusal.startswith(f"backend='triton' was asked for but cannot be used: {reason}.")
    assert "pip install" in refusal


@interpreted
def test_an_ascent_of_fewer_parameters_is_refused() -> None:
    """The kernels would read beyond the end of what it has written."""
    from fused_sam.backends import triton

    params = [torch.randn(5), torch.randn(3)]
    ascent = triton.Batch(params[:1], [torch.randn(5)])
    with pytest.raises(ValueError, match="Must be of the same parameters"):
        triton.Batch(params, None, ascent)


@needs_triton
@compiled
def test_it_is_chosen_for_gpus_where_the_native_library_has_no_part_for_them() -> None:
    if backends.available("cuda")["native"] == "ok":
        pytest.skip("the native library has a CUDA part")
    for device_type in ("cuda", "xpu"):
        assert backends.for_device(device_type).__name__ == "fused_sam.backends.triton"
        assert backends.for_device(device_type, "triton").__name__ == "fused_sam.backends.triton"
    assert backends.for_device("cpu").__name__ != "fused_sam.backends.triton"
    with pytest.raises(RuntimeError, match="cannot take cpu tensors: the Triton kernels need a GPU"):
        backends.for_device("cpu", "triton")
    assert "not for meta tensors" in backends.available("meta")["triton"]
