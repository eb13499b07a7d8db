"""What nvcc and Triton emit, run: the PTX of the kernels on an emulator (ptx/), through the launch code that ships.

`make ptx` runs it for more architectures, orders of threads and tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE
from ptx import build
from triton_tests import compiled, needs_triton

HERE = Path(__file__).parent
LONG = "FUSED_SAM_PTX_LONG" in os.environ

ARCHITECTURES = (80, 90) if LONG else (90,)  # that of make's install: nothing is compiled twice
OPS = "test_ops.py test_ops_update.py test_ops_accumulate.py test_ops_adam.py"
MORE_OPS = "test_ops_masters.py test_p_norms.py test_mixed_dtypes.py"
# What is about the kernels alone, and of the optimizer every way to them.
LAUNCHES = (
    "ptx/launches.py ptx/failures.py ptx/lists.py ptx/properties.py test_storage.py test_faults.py test_parity.py "
    "test_gradient_ownership.py test_optimizer_contract.py test_device_scalars.py test_microbatch.py test_masters.py"
)
# Files, which of their tests, and the kernels that these must launch.
SUITES = {
    "ops": (OPS, "emulated or share", "norm perturb accumulate sgd adam"),
    "more ops": (MORE_OPS, "emulated", "peak powers perturb power_perturb sgd adam"),
    "launches": (
        LAUNCHES,
        "launches or failures or lists or properties and not no_program or emulated and (test_storage or test_faults "
        "or test_gradient_ownership or test_optimizer_contract or test_device_scalars or test_masters "
        "or test_parity and (four_groups or network) or test_microbatch and reference)",
        "norm peak powers perturb power_perturb accumulate sgd adam",
    ),
}
if LONG:
    # The emulator is for one thread at a time.
    others = {path.name for path in HERE.glob("test_*.py")} - {*OPS.split(), *MORE_OPS.split(), "test_threads.py"}
    SUITES |= {
        "launches": (LAUNCHES, "launches or failures or lists or properties", SUITES["launches"][2]),
        "optimizer": (" ".join(sorted(others)), "emulated", SUITES["launches"][2]),
    }
# All of the op surface, of the optimizer what differs from backend to backend.
TRITON_SUITES = {
    "ops": (
        "test_ops.py test_ops_update.py test_ops_accumulate.py test_ops_adam.py",
        "triton and not test_ops_adam or triton and (float32 or not closed_form)",
        "norm_partials norm_total restore restore_accumulate perturb sgd_update adam_update",
    ),
    "optimizer": (
        "test_ops_arguments.py test_mixed_dtypes.py test_device_scalars.py test_gradient_ownership.py "
        "test_p_norms.py test_decay_in_ascent.py test_microbatch.py test_optimizer_contract.py test_faults.py",
        "triton and (test_ops_arguments or test_mixed_dtypes or test_device_scalars or test_gradient_ownership "
        "or test_p_norms and (perturb and swap and float32 and (1.0 or inf) or p_1 or p_inf or length) "
        "or test_decay_in_ascent and closed_form and swap "
        "or test_microbatch and (bits or reference and 3-asam or None) "
        "or (test_optimizer_contract or test_faults) and (not exception or Mishap))",
        "norm_partials norm_total peak_partials peak_total perturb restore_accumulate sgd_update adam_update",
    ),
}
if LONG:
    more = " test_adam.py test_parity.py test_storage.py test_amp.py"
    TRITON_SUITES = {
        "ops": (TRITON_SUITES["ops"][0], "triton", TRITON_SUITES["ops"][2]),
        "optimizer": (TRITON_SUITES["optimizer"][0] + more, "triton", TRITON_SUITES["optimizer"][2]),
    }
ORDERS = {"blocks side by side": "resident=3"}
if LONG:
    ORDERS |= {"one by one": "seed=1 resident=1 shuffle=0", "preempted": "seed=2 resident=4 quantum=300"}

# Each byte is filled when it is given out, of which there must be no second cache. Memory is kept: to take it from the
# kernel for every launch would be a tenth of the time.
MALLOC = {"perturb": 85, "tcache_count": 0, "trim_threshold": 1 << 29, "top_pad": 1 << 26, "mmap_threshold": 1 << 26}

pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
needs_emulator = pytest.mark.skipif(build.why_not(with_nvcc=False) is not None, reason="g++ not installed")


def environment(settings: str = "", **more: str) -> dict[str, str]:
    """Return that of a process which has the emulator, and whose fresh memory is poisoned."""
    named = {"PTX_EMULATOR": str(build.emulator()), "PTX_SETTINGS": settings}
    named["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
    named["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    return os.environ | named | more


def run_tests(files: str, which: str, env: dict[str, str], launches: Path) -> str:
    """Run tests in such a process, and return which kernels ran there."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx.plugin", "-p", "no:cacheprovider", "-k", which]
    command += [str(HERE / file) for file in files.split()]
    env |= {"PTX_LAUNCHES": str(launches)}
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 8
    return launches.read_text()


@needs_nvcc
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_suite_passes_on_the_compiled_kernels(architecture: int, suite: str, order: str, tmp_path: Path) -> None:
    files, which, kernels = SUITES[suite]
    profile = "hundreds" if LONG else "few"
    env = environment(ORDERS[order], PTX_NATIVE=str(build.native(architecture)), HYPOTHESIS_PROFILE=profile)
    launched = run_tests(files, which, env, tmp_path / "launches")
    for kernel in kernels.split():
        assert f"{len(kernel) + 7}{kernel}_kernel" in launched  # as C++ mangles it: behind the length of the name


@needs_emulator
@needs_triton
@compiled
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suite", TRITON_SUITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_suite_passes_on_what_triton_compiles(architecture: int, suite: str, order: str, tmp_path: Path) -> None:
    cache = build.BUILD / "triton"
    env = environment(ORDERS[order], PTX_TRITON=str(architecture), TRITON_CACHE_DIR=str(cache))
    files, which, kernels = TRITON_SUITES[suite]
    launched = run_tests(files, which, env, tmp_path / "launches")
    for kernel in kernels.split():
        assert f" {kernel}\n" in launched


@needs_emulator
def test_the_emulator_knows_its_instructions_and_says_what_is_wrong(tmp_path: Path) -> None:
    run_tests("ptx/instructions.py", "", environment(), tmp_path / "launches")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "compiler",
    [pytest.param("nvcc", marks=needs_nvcc), *([pytest.param("triton", marks=needs_triton)] if LONG else [])],
)
def test_every_defect_is_found_and_where_there_is_none_nothing_is(compiler: str, architecture: int) -> None:
    """A test of the test: fences and barriers that are gone, loads and shuffles that are not what they should be."""
    if compiler == "nvcc":
        env = environment(PTX_NATIVE=str(build.native(architecture)))
    else:
        env = environment(PTX_TRITON=str(architecture), TRITON_CACHE_DIR=str(build.BUILD / "triton"))
    command = [sys.executable, "-m", "ptx.defects"]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("none") == {"places": 0, "reports": [], "found": []}
    assert len(said) >= 5
    for name, about in said.items():
        assert about["places"], name
        assert about["reports"] + about["found"], name
