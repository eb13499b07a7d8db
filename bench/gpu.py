"""Build, test, sanitize and measure on a machine with a GPU: python -m bench.gpu --out FOLDER

No network is used. Each step has a time limit and a log; a step that fails does not stop those after it. What is
left of the budget decides what each may take: when it runs out, later steps are shortened or skipped, and said to
be. Writes at most eight files: build.log, tests.log, sanitizer.log, bench.log, gpu_step.jsonl, gpu_iteration.jsonl,
gpu_counters.jsonl, summary.txt. The summary is printed last.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import records
from bench.gpu_counters import TOOL, find_tool
from bench.gpu_tables import summary

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
BUDGET_S = 540
LARGEST_LOG = 4 << 20
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_EXIT = 9
# The tests that reach every kernel, in the dtypes with most traffic: the tools slow kernels up to a hundred times.
SANITIZED = ("tests/test_ops.py", "tests/test_ops_update.py")
SELECTION = (
    "native-cuda and (float32 or bfloat16) and (test_norm_matches or test_norm_of_strided or test_perturb_matches or "
    "test_perturb_of_strided or test_restore_returns or test_sgd_update_without_backup or test_sgd_update_of_strided)"
)
STATES = """
from fused_sam import backends
states = backends.available("cuda")
print(", ".join(f"{name}: {state}" for name, state in states.items()))
raise SystemExit(states["native"] != "ok")
"""
# A benchmark ends by itself, this long before it would be stopped.
SLACK_S = {"counters": 5, "step": 25, "iteration": 45}
# Most of a test's time is the host's, and the compiler's of Triton.
TEST_WORKERS = 8


@dataclass(frozen=True)
class Step:
    """A step of the plan: seconds it may take at most, and those without which it is not begun."""

    name: str
    limit_s: float
    least_s: float


PLAN = (
    Step("build", 120, 20),
    Step("selfcheck", 30, 10),
    Step("tests", 150, 20),
    *(Step(tool, 45, 10) for tool in TOOLS),
    Step("counters", 60, 25),
    Step("step", 150, 45),
    Step("iteration", 150, 60),
)


@dataclass
class Outcome:
    """How a step ended."""

    name: str
    state: str
    seconds: float
    note: str = ""


def grant(step: Step, remaining_s: float, later: Sequence[Step]) -> float:
    """Seconds for a step: its limit, or what is left beyond the least that later ones need; 0: too little."""
    seconds = min(step.limit_s, remaining_s - sum(other.least_s for other in later))
    return seconds if seconds >= step.least_s else 0.0


class Runner:
    """Runs commands with a time limit, into one log per kind of step."""

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        self.out = out
        self.environment = environment

    def run(self, command: Sequence[str], log: str, seconds: float, **environment: str) -> tuple[int | None, str]:
        """Exit code, None past the limit, and the output; the log is appended to and kept below LARGEST_LOG."""
        path = self.out / log
        begin = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=records.ROOT,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        output = path.read_bytes()[begin:].decode(errors="replace")
        _shorten(path)
        return code, output


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started: they are a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _shorten(path: Path) -> None:
    """Leave out the middle of a log that grew too long."""
    data = path.read_bytes()
    if len(data) > LARGEST_LOG:
        half = LARGEST_LOG // 2
        path.write_bytes(data[:half] + b"\n[...]\n" + data[-half:])


def verdict(name: str, code: int | None, seconds: float, note: str = "") -> Outcome:
    """Of one command."""
    if code is None:
        return Outcome(name, FAILED, seconds, f"not done in {seconds:.0f} s")
    return Outcome(
        name, OK if code == 0 else FAILED, seconds, note if code == 0 else f"exit code {code}; {note}".strip("; ")
    )


def last_line(output: str) -> str:
    """Of what a command said."""
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines else ""


def build(runner: Runner, seconds: float) -> Outcome:
    """Install in place without isolation and network; where pip or its metadata fail, only the library."""
    begin = time.monotonic()
    pip = [sys.executable, "-m", "pip", "install"]
    commands = (
        [*pip, "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."],
        [sys.executable, "setup.py", "build_ext", "--inplace"],
    )
    codes = []
    for command in commands:
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            break
        codes.append(runner.run(command, "build.log", left)[0])
        if codes[-1] == 0:
            note = "" if len(codes) == 1 else "pip failed, built in place"
            return Outcome("build", OK, time.monotonic() - begin, note)
    return Outcome("build", FAILED, time.monotonic() - begin, f"exit codes {codes}, see build.log")


def selfcheck(runner: Runner, seconds: float) -> Outcome:
    """python -m fused_sam, and whether the kernels that were asked for are there: their tests would only be skipped."""
    begin = time.monotonic()
    code, _ = runner.run([sys.executable, "-m", "fused_sam"], "build.log", seconds)
    if code == 0:
        left = seconds - (time.monotonic() - begin)
        code, output = runner.run([sys.executable, "-c", STATES], "build.log", left)
        return verdict("selfcheck", code, time.monotonic() - begin, last_line(output))
    return verdict("selfcheck", code, time.monotonic() - begin, "see build.log")


def tests(runner: Runner, seconds: float) -> Outcome:
    """Every test marked gpu, by several processes where pytest-xdist is installed."""
    begin = time.monotonic()
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=20"]
    if importlib.util.find_spec("xdist") is not None:
        workers = min(TEST_WORKERS, os.cpu_count() or 1)
        options += ["--numprocesses", str(workers), "--dist", "worksteal"]
    # Threads that wait leave the cores to the other processes.
    command = [sys.executable, "-m", "pytest", *options]
    code, output = runner.run(command, "tests.log", seconds, OMP_WAIT_POLICY="passive")
    seconds = time.monotonic() - begin
    if code == 0 and " passed" not in last_line(output):
        return Outcome("tests", FAILED, seconds, f"no test passed: {last_line(output)}")
    return verdict("tests", code, seconds, last_line(output))


def sanitize(tool: str) -> Callable[[Runner, float], Outcome]:
    """A tool of compute-sanitizer over the op tests."""

    def run(runner: Runner, seconds: float) -> Outcome:
        executable = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
        if executable is None:
            return Outcome(tool, SKIPPED, 0.0, f"{SANITIZER} is not installed")
        begin = time.monotonic()
        command = [executable, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(SANITIZER_EXIT)]
        # initcheck has to see what torch's kernels write, or all of it would count as never written.
        if tool != "initcheck":
            command += ["--kernel-regex", "kns=fused_sam"]
        command += [sys.executable, "-m", "pytest", *SANITIZED, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        # With torch's cache an access beyond a tensor ends in another one and is no error.
        code, output = runner.run(
            [*command, "-k", SELECTION], "sanitizer.log", seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        return judge(tool, code, output, time.monotonic() - begin)

    return run


def judge(tool: str, code: int | None, output: str, seconds: float) -> Outcome:
    """What a tool's output says; of initcheck's reports only those about our kernels count."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    said = next((line for line in reversed(lines) if "SUMMARY" in line), "no summary")
    passed = next((line for line in output.splitlines() if " passed" in line), "")
    if code is not None and not passed:
        return Outcome(tool, FAILED, seconds, f"exit code {code}, no test passed")
    if tool == "initcheck" and code == SANITIZER_EXIT:
        ours = sum(line.startswith("at ") and "fused_sam" in line for line in lines)
        if not ours:
            return Outcome(tool, OK, seconds, "reports about torch's kernels only")
        return Outcome(tool, FAILED, seconds, f"{ours} reports about our kernels")
    return verdict(tool, code, seconds, said)


def benchmark(name: str, *options: str) -> Callable[[Runner, float], Outcome]:
    """bench.gpu_step, bench.gpu_iteration or bench.gpu_counters, told to end in time."""

    def run(runner: Runner, seconds: float) -> Outcome:
        begin = time.monotonic()
        module = f"gpu_{name}"
        command = [sys.executable, "-m", f"bench.{module}", "--out", str(runner.out / f"{module}.jsonl"), *options]
        command += ["--seconds", f"{seconds - SLACK_S[name]:.0f}"]
        code, output = runner.run(command, "bench.log", seconds)
        late = sum("not measured" in line for line in output.splitlines())
        note = f"{late} not measured, out of time" if late else ""
        note = note if code == 0 else last_line(output)
        return verdict(name, code, time.monotonic() - begin, note)

    return run


def counters(runner: Runner, seconds: float) -> Outcome:
    """bench.gpu_counters, where its tool is installed."""
    if find_tool() is None:
        return Outcome("counters", SKIPPED, 0.0, f"{TOOL} is not installed")
    return benchmark("counters", "--sets", "resnet50")(runner, seconds)


ACTIONS: dict[str, Callable[[Runner, float], Outcome]] = {
    "build": build,
    "selfcheck": selfcheck,
    "tests": tests,
    **{tool: sanitize(tool) for tool in TOOLS},
    "counters": counters,
    "step": benchmark("step", "--rounds", "15", "--compile-seconds", "40"),
    "iteration": benchmark("iteration", "--rounds", "6"),
}


def carry_out(
    names: Sequence[str],
    runner: Runner,
    budget_s: float,
    actions: dict[str, Callable[[Runner, float], Outcome]] = ACTIONS,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """All chosen steps in the plan's order, each within what the budget still grants."""
    end = clock() + budget_s
    steps = [step for step in PLAN if step.name in names]
    outcomes = []
    for number, step in enumerate(steps):
        seconds = grant(step, end - clock(), steps[number + 1 :])
        if seconds == 0:
            outcomes.append(Outcome(step.name, SKIPPED, 0.0, "the time is up"))
            continue
        print(f"{step.name}: at most {seconds:.0f} s", flush=True)
        try:
            outcomes.append(actions[step.name](runner, seconds))
        except OSError as error:
            outcomes.append(Outcome(step.name, FAILED, 0.0, records.reason(error)))
    return outcomes


def environment() -> dict[str, str]:
    """For all commands: CUDA is a must, compiled for the GPU that is present only."""
    major, minor = torch.cuda.get_device_capability()
    wanted = {
        "FUSED_SAM_NATIVE": "ON",
        "FUSED_SAM_CUDA": "ON",
        "FUSED_SAM_CUDA_ARCHITECTURES": f"{major}{minor}",
        "PYTHONUNBUFFERED": "1",
    }
    return dict(os.environ) | wanted


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [step.name for step in PLAN]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and rows; it is made")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds for all (default: {BUDGET_S})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the plan; 1 if any step failed, or there is no GPU."""
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("No GPU: torch sees no CUDA device, and everything here needs one.", file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = carry_out(options.steps, Runner(out, environment()), options.budget)
    lines = [f"{one.name:10} {one.state:8} {one.seconds:5.0f} s  {one.note}".rstrip() for one in outcomes]
    text = "\n".join([*lines, "", summary(records.read(out))])
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 1 if any(one.state == FAILED for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
