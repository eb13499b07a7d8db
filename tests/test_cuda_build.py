"""The CUDA code on machines that need no GPU: what the install compiled; in `make soak` for every architecture."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass

from fused_sam import backends

if backends.available()["native"] != "ok":
    pytest.skip("the native core is not built", allow_module_level=True)

from fused_sam import _native

ROOT = Path(__file__).parent.parent
LIBRARY = Path(_native.__file__)
ARCHITECTURE = "90"  # the figures depend on the compiler's choices for one
KERNELS = ("norm", "peak", "powers", "perturb", "power_perturb", "accumulate", "sgd", "adam")
THREADS_PER_BLOCK, REGISTERS = 256, 65536

compiled = pytest.mark.skipif(
    f"sm_{ARCHITECTURE}" not in _native.cuda.architectures() or sass.cuobjdump() is None,
    reason=f"this build has no CUDA code for sm_{ARCHITECTURE}, or cuobjdump is not installed",
)


@pytest.fixture(scope="module")
def registers() -> dict[str, int]:
    """Registers of each kernel by its mangled name; none may keep anything in local memory."""
    report = sass.dump(LIBRARY, "-res-usage", "-arch", f"sm_{ARCHITECTURE}")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert len(found) > 3
    assert [name for name, _, stack, local in found if int(stack) + int(local)] == []
    return {name: int(count) for name, count, _, _ in found}


@compiled
def test_every_kernel_is_compiled_and_none_spills(registers: dict[str, int]) -> None:
    names = {re.search(r"\d+([a-z]+(?:_[a-z]+)*)_kernel", name)[1] for name in registers if "_kernel" in name}
    assert names == set(KERNELS)
    for name, count in registers.items():
        assert count <= 128, name  # two blocks of 256 threads, at least


# Loads of 16 bytes that a lane has under way in each main loop, and KB on their way to a multiprocessor then: at a
# latency of 1 us, an H200 needs 33 to move 4.3 TB/s. Of SGD and Adam the loops of the first step, which happens once,
# and of the restore alone have fewer.
FIGURES = [
    *[("norm", dtype, 4, 64, 4) for dtype in ("float", "bf16", "f16", "double")],
    *[("perturb", dtype, 4, 64, 9) for dtype in ("float", "bf16", "f16", "double")],
    *[("accumulate", dtype, 4, 64, 2) for dtype in ("float", "bf16", "f16", "double")],
    *[("sgd", dtype, 6, 56, 8) for dtype in ("float", "bf16", "f16", "double")],
    ("adam", "float", 4, 40, 5),  # the restore's loop is one of them
    ("adam", "double", 4, 32, 5),
    *[("adam", dtype, 8, 64, 4) for dtype in ("bf16", "f16")],
]
MANGLED = {"float": "ff", "double": "dd", "bf16": r"NS_4bf16ES\d_", "f16": r"NS_3f16ES\d_"}


@compiled
def test_loads_are_under_way_together(registers: dict[str, int]) -> None:
    """A warp that waits for one load before it issues the next cannot keep memory busy."""
    names = {}
    for kernel, dtype, *_ in FIGURES:
        # Of three sizes of arguments that of ResNet-50.
        pattern = re.compile(rf"\d+{kernel}_kernelINS\w*?7OneTypeI{MANGLED[dtype]}NS_9NoRoundedEEELi8064E")
        (names[kernel, dtype],) = filter(pattern.search, registers)
    loops = sass.loops_of(LIBRARY, ARCHITECTURE, list(names.values()))
    for kernel, dtype, loads, kilobytes, count in FIGURES:
        name = names[kernel, dtype]
        good = [n for n in loops[name] if n >= loads]
        warps = REGISTERS // (THREADS_PER_BLOCK * -(-registers[name] // 8) * 8) * THREADS_PER_BLOCK // 32
        assert len(good) >= count, (kernel, dtype, loops[name])
        assert min(good) * 16 * 32 * min(warps, 64) / 1024 >= kilobytes, (kernel, dtype, registers[name])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_an_error_of_the_runtime_is_that_of_the_call_that_made_it(tmp_path: Path) -> None:
    program = tmp_path / "harness"
    sources = [
        ROOT / "tests/launches" / "harness.cu",
        ROOT / "tests/launches" / "runtime.cpp",
        ROOT / "csrc/cuda/work_list.cpp",
    ]
    build = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-cudart=none", "-arch=sm_90", *sources, "-o", program]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "ok\n"


@pytest.mark.slow
@pytest.mark.skipif("FUSED_SAM_SOAK" not in os.environ, reason="minutes of compilation: make soak")
@pytest.mark.skipif(shutil.which("nvcc") is None or importlib.util.find_spec("pybind11") is None, reason="no nvcc")
def test_every_architecture_is_compiled_without_a_spill(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DFUSED_SAM_CUDA=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--target", "fused_sam_cuda", "-v"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    pieces = re.split(r"Compiling entry function '(\S+)' for '(sm_\d+)'", done.stdout)[1:]
    found = list(zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True))
    for name, architecture, said in found:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, (name, architecture, said)
    nvcc = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {"75", "80", "86", "89", "90", "100", "120"} & {line.removeprefix("compute_") for line in nvcc.split()}
    for kernel in KERNELS:
        mangled = f"{len(kernel) + 7}{kernel}_kernel"  # as C++ does: the length of the name before the name
        assert {arch.removeprefix("sm_") for name, arch, _ in found if mangled in name} == known, kernel
    # Newer GPUs compile PTX when it is loaded: that of the newest, and 11.0, which cannot use it, that of 10.0.
    for newest in {max(known, key=int)} | ({"100"} & known):
        assert re.search(
            rf"arch=compute_{newest},code=\[?(sm_{newest},)?compute_{newest}|code=compute_{newest}", done.stdout
        )
