"""What each step of bench.gpu runs, on a GPU or, rehearsed, in its place on the CPU, and how it tells success."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench import records
from bench.gpu.commands import GRACE_S, SHORT_GRACE_S, Runner
from bench.gpu.counters import TOOL, find_tool

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
ROWS = "gpu.jsonl"
SANITIZER, SANITIZER_EXIT = "compute-sanitizer", 9
# Whether the core that was built is the one that is imported.
BUILT = """
import pathlib
import fused_sam._native as core
print(core.__file__)
raise SystemExit(not pathlib.Path(core.__file__).is_relative_to(pathlib.Path.cwd()))
"""
# The doctor, and whether the kernels that were asked for are there: their tests would only be skipped.
SELFCHECK = """
import sys
from fused_sam import backends
from fused_sam.cli.main import main
code = main([])
states = backends.available(sys.argv[1])
print(", ".join(f"{name}: {state}" for name, state in states.items()))
raise SystemExit(code or states["native"] != "ok")
"""
# Most of a test's time is the host's, and the compiler's of Triton.
TEST_WORKERS, TEST_SECONDS = 8, 30
# -W default: under a torch and a Python of the machine's own, warnings of theirs are no failures of ours.
PYTEST_OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_plugin", "-W", "default")
PYTEST_OPTIONS += ("--continue-on-collection-errors", "--maxfail", "40")
COUNTS = re.compile(r"(\d|no tests).* in \d+\.\d+s")
# Every test marked gpu belongs to one of these or to the eager backend, which is torch's own arithmetic.
NATIVE, TRITON = "not triton and not eager-cuda", "triton"
FIRST_TESTS = ["tests/test_cuda.py", *sorted(f"tests/{path.name}" for path in records.ROOT.glob("tests/test_ops*.py"))]
# For each kernel tests of aligned and of other operands: the tools slow kernels up to a hundred times.
SANITIZED = {
    "norm": ("test_ops.py::test_norm_matches_an_exact_sum", "test_ops.py::test_norm_of_strided_tensors"),
    "perturb": ("test_ops.py::test_perturb_matches_the_closed_form", "test_ops.py::test_perturb_of_strided_tensors"),
    "restore": ("test_ops.py::test_restore_returns_the_same_bits",),
    "SGD": (
        "test_ops_update.py::test_sgd_update_without_backup_starts_from_the_parameter",
        "test_ops_update.py::test_sgd_update_of_strided_tensors",
        "test_ops_update.py::test_a_call_over_all_dtypes_equals_a_call_for_each",
    ),
    "Adam": (
        "test_ops_adam.py::test_without_backup_the_step_starts_from_the_parameter",
        "test_ops_adam.py::test_strided_tensors",
    ),
    "accumulate": (
        "test_ops_accumulate.py::test_every_dtype_and_group_in_one_call",
        "test_ops_accumulate.py::test_what_the_journal_holds_is_undone_in_the_same_call",
        "test_ops_accumulate.py::test_strided_tensors",
    ),
    "general p": (
        "test_p_norms.py::test_strided_tensors",
        "test_p_norms.py::test_p_1_over_tensors_of_several_layouts",
    ),
    "masters": (
        "test_ops_masters.py::test_missing_gradients_and_parameters_without_masters",
        "test_ops_masters.py::test_strided_parameters",
    ),
}
SANITIZED_TESTS = [f"tests/{name}" for names in SANITIZED.values() for name in names]
FEW_DTYPES = "not float64 and (bfloat16 or not float16)"
# On the CPU a benchmark only shows that it runs; its rows are of the kind "smoke".
REHEARSED = {
    "step": ("--device", "cpu", "--sets", "resnet20", "--rounds", "2", "--compile-seconds", "1"),
    "iteration": ("--device", "cpu", "--smoke"),
}


class Result(NamedTuple):
    """How a step ended, and a remark."""

    state: str
    note: str = ""


# What a step does within so many seconds.
Action = Callable[[Runner, float], Result]


def environment(rehearse: bool) -> dict[str, str]:
    """Return that of all commands: the checkout is imported, CUDA is a must, for the GPU that is present only."""
    folders = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    wanted = {"PATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}
    wanted["PYTHONPATH"] = os.pathsep.join(filter(None, [str(records.ROOT), os.environ.get("PYTHONPATH")]))
    if shutil.which("ninja", path=wanted["PATH"]):
        wanted["CMAKE_GENERATOR"] = "Ninja"
    if not rehearse:
        architecture = "{}{}".format(*torch.cuda.get_device_capability())
        wanted |= {"FUSED_SAM_NATIVE": "ON", "FUSED_SAM_CUDA": "ON", "FUSED_SAM_CUDA_ARCHITECTURES": architecture}
    return dict(os.environ) | wanted


def verdict(code: int | None, note: str = "") -> Result:
    """Return what the exit code of a command means."""
    if code == 0:
        return Result(OK, note)
    return Result(FAILED, f"{'not done in time' if code is None else f'exit code {code}'}; {note}".strip("; "))


def last_line(output: str) -> str:
    """Return the last line that a command wrote."""
    return (output.strip().splitlines() or [""])[-1]


def counts(output: str) -> str:
    """Return the line in which pytest counts tests; it is not the last one of a run that was interrupted."""
    return next((line for line in reversed(output.splitlines()) if COUNTS.match(line)), "no test counted")


def builds(runner: Runner) -> dict[str, list[list[str]]]:
    """Return the commands of each way to build, best first; the last needs no setuptools. Rehearsed, it is begun."""
    folder = "build/rehearsal" if runner.rehearse else "build/gpu"
    options = {"Python_EXECUTABLE": sys.executable, "CMAKE_BUILD_TYPE": "Release"}
    options["FUSED_SAM_CUDA"] = "OFF" if runner.rehearse else "ON"
    options["FUSED_SAM_CUDA_ARCHITECTURES"] = runner.environment.get("FUSED_SAM_CUDA_ARCHITECTURES", "")
    configure = ["cmake", "-S", ".", "-B", folder, *(f"-D{name}={value}" for name, value in options.items())]
    if runner.rehearse:
        return {"CMake, configured only": [configure]}
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    compiled = ["cmake", "--build", folder, "--target", "_native", "--parallel", str(os.cpu_count() or 1)]
    return {
        "pip": [[sys.executable, "-m", "pip", "install", *offline, "--editable", "."]],
        "setup.py": [[sys.executable, "setup.py", "build_ext", "--inplace"]],
        "CMake": [configure, compiled, ["cmake", "--install", folder, "--prefix", "."]],
    }


def build(runner: Runner, seconds: float) -> Result:
    """Build the core in place without network, in the first way that works and after which it is imported from here."""
    end = time.monotonic() + seconds
    failed = []
    for name, commands in builds(runner).items():
        for command in [*commands, [sys.executable, "-c", BUILT]]:
            left = end - time.monotonic()
            code = runner.run(command, "build.log", left, SHORT_GRACE_S)[0] if left > 0 else None
            if code != 0:
                failed.append(f"{name} failed ({'out of time' if code is None else code})")
                break
        else:
            return Result(OK, ", ".join([*failed, f"built by {name}"]))
    return Result(FAILED, f"{', '.join(failed)}; see build.log")


def selfcheck(runner: Runner, seconds: float) -> Result:
    """Make a step on each backend and say which of them work."""
    device = "cpu" if runner.rehearse else "cuda"
    code, output = runner.run([sys.executable, "-c", SELFCHECK, device], "build.log", seconds, SHORT_GRACE_S)
    return verdict(code, last_line(output))


def tests(selection: str, *arguments: str) -> Action:
    """Return a step that runs tests marked gpu, by several processes where pytest-xdist is installed.

    Rehearsed, they are collected as on a GPU: nothing else here shows that the selection is not empty.
    """

    def act(runner: Runner, seconds: float) -> Result:
        command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, *arguments, "-m", "gpu", "-k", selection]
        if runner.rehearse:
            command += ["-p", "bench.gpu.pretended", "--collect-only"]
        elif importlib.util.find_spec("xdist") is not None:
            workers = min(TEST_WORKERS, os.cpu_count() or 1)
            command += ["--numprocesses", str(workers), "--dist", "worksteal"]
        code, output = runner.run(command, "tests.log", seconds, **tests_environment(runner, TEST_SECONDS))
        return verdict_of_tests(code, counts(output))

    return act


def tests_environment(runner: Runner, seconds: float) -> dict[str, str]:
    """Return what bench.gpu.pytest_plugin asks for. Threads that wait leave the cores to the other processes."""
    failures = {"FUSED_SAM_FAILURES": str(runner.out / "failures.log"), "FUSED_SAM_TEST_SECONDS": f"{seconds:.0f}"}
    return failures | {"OMP_WAIT_POLICY": "passive"}


def verdict_of_tests(code: int | None, message: str) -> Result:
    """Return what a run of pytest showed: one that ran, or collected, nothing is no success."""
    if code == 0 and not re.search(r"\d passed|\d tests collected", message):
        return Result(FAILED, f"no test passed: {message}")
    return verdict(code, message)


def sanitize(tool: str) -> Action:
    """Return a step that runs a tool of compute-sanitizer over a test of every kernel.

    Rehearsed, the tests run without it, on the CPU's kernels.
    """

    def act(runner: Runner, seconds: float) -> Result:
        target = "native-cpu" if runner.rehearse else "native-cuda"
        command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, *SANITIZED_TESTS]
        command += ["-k", f"{target} and {FEW_DTYPES}"]
        variables = tests_environment(runner, seconds)
        if runner.rehearse:
            if tool != "memcheck":
                return Result(SKIPPED, "as memcheck")
            code, output = runner.run(command, "sanitizer.log", seconds, **variables)
            return verdict_of_tests(code, f"without the tool: {counts(output)}")
        executable = shutil.which(SANITIZER, path=runner.environment["PATH"])
        if executable is None:
            return Result(SKIPPED, f"{SANITIZER} is not installed")
        watched = [executable, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(SANITIZER_EXIT)]
        # initcheck has to see what torch's kernels write, or all of it would count as never written.
        if tool != "initcheck":
            watched += ["--kernel-regex", "kns=fused_sam"]
        # With torch's cache an access beyond a tensor ends in another one and is no error.
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        code, output = runner.run([*watched, *command], "sanitizer.log", seconds, **variables)
        return parse_report(tool, code, output)

    return act


def parse_report(tool: str, code: int | None, output: str) -> Result:
    """Return what a tool's report means; of initcheck's reports only those about our kernels count."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    message = next((line for line in reversed(lines) if "SUMMARY" in line), "no summary")
    message = f"{message}; {counts(output)}"
    passed = " passed" in message and " failed" not in message
    if tool == "initcheck" and code == SANITIZER_EXIT and passed:
        ours = sum(line.startswith("at ") and "fused_sam" in line for line in lines)
        return Result(FAILED if ours else OK, f"{ours} reports about our kernels; {message}")
    return verdict_of_tests(code, message)


def benchmark(module: str, slack_s: float, *options: str, grace_s: float = GRACE_S) -> Action:
    """Return a step that runs bench.gpu.<module>, told to end so long before it would be interrupted."""

    def act(runner: Runner, seconds: float) -> Result:
        command = [sys.executable, "-m", f"bench.gpu.{module}", "--out", str(runner.out / ROWS), *options]
        command += ["--seconds", f"{max(1.0, seconds - grace_s - slack_s):.0f}"]
        command += REHEARSED[module] if runner.rehearse else ()
        code, output = runner.run(command, "bench.log", seconds, grace_s)
        late = sum("not measured" in line for line in output.splitlines())
        note = f"{late} not measured, out of time" if late else ""
        return verdict(code, last_line(output) if code else note)

    return act


def counters(runner: Runner, seconds: float) -> Result:
    """Run bench.gpu.counters, where its tool is installed."""
    if runner.rehearse or find_tool() is None:
        return Result(SKIPPED, "nothing to count here" if runner.rehearse else f"{TOOL} is not installed")
    options = ("--sets", "resnet50", "--variants", "fused_sam")
    return benchmark("counters", 3, *options, grace_s=SHORT_GRACE_S)(runner, seconds)
