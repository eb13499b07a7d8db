"""The compiled CUDA code, on machines that need no GPU: for one architecture, in `make soak` for all of them.

Where there is no GPU, the install compiles for another.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALL = "FUSED_SAM_SOAK" in os.environ  # which takes two cores minutes
ARCHITECTURES = {"75", "80", "86", "89", "90", "100", "120"} if ALL else {"90"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="pybind11 is not installed"),
]


def test_what_the_kernels_are_compiled_to(tmp_path: Path) -> None:
    """One test: several, spread over processes, would each compile."""
    said = report(tmp_path)
    every_kernel_is_compiled_for_every_architecture(said)
    no_kernel_spills_registers(kernels(said))
    registers_are_left_for_enough_warps(kernels(said))


def report(build: Path) -> str:
    """What ptxas says of a build."""
    # The same CUDA sources and flags as in the package; the library itself is linked by the install.
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFUSED_SAM_CUDA=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
    configure += [] if ALL else [f"-DFUSED_SAM_CUDA_ARCHITECTURES={';'.join(sorted(ARCHITECTURES))}"]
    for command in (configure, ["cmake", "--build", str(build), "--target", "fused_sam_cuda", "-v"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        assert done.returncode == 0, done.stdout
    return done.stdout


def kernels(report: str) -> list[tuple[str, str, str]]:
    """(kernel, architecture, what follows in the report) of every entry function."""
    pieces = re.split(r"Compiling entry function '(\S+)' for '(sm_\d+)'", report)[1:]
    return list(zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True))


def every_kernel_is_compiled_for_every_architecture(report: str) -> None:
    nvcc = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = ARCHITECTURES & {line.removeprefix("compute_") for line in nvcc.split()}
    # As C++ mangles them: the length of the name before the name.
    for name in (
        *("11norm_kernel", "14perturb_kernel", "10sgd_kernel", "11peak_kernel", "13powers_kernel"),
        "17accumulate_kernel",
    ):
        compiled = [arch.removeprefix("sm_") for kernel, arch, _ in kernels(report) if name in kernel]
        assert sorted(compiled) == sorted([*known, *known]), name  # for short and for long lists
    newest = max(known, key=int)
    assert f"arch=compute_{newest},code=[compute_{newest}" in report or f"code=compute_{newest}" in report


def no_kernel_spills_registers(found: list[tuple[str, str, str]]) -> None:
    assert len(found) > 3
    for kernel, arch, said in found:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, (kernel, arch, said)


def registers_are_left_for_enough_warps(found: list[tuple[str, str, str]]) -> None:
    """65536 registers: 128 a thread leave room for two blocks of 256, which hide the latency of memory."""
    for kernel, arch, said in found:
        (registers,) = re.findall(r"Used (\d+) registers", said)
        assert int(registers) <= 128, (kernel, arch)
