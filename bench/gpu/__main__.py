"""Build, test, sanitize and measure on a machine with a GPU, in ten minutes: python -m bench.gpu --out FOLDER

No network is used. The most valuable facts come first, and what is known is written at once, so that nothing is lost
when the machine is taken away. Each step has a limit; one that fails, hangs or crashes does not stop those after it.
Writes at most seven files: build.log, tests.log, failures.log, sanitizer.log, bench.log, gpu.jsonl, and summary.txt,
which is also printed last. With --rehearse every step is begun on the CPU, with a stand-in for what needs a GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import flags, records
from bench.gpu import rivals as gpu_rivals
from bench.gpu.actions import (
    FAILED,
    FIRST_TESTS,
    NATIVE,
    SKIPPED,
    TRITON,
    Action,
    Result,
    benchmark,
    build,
    counters,
    environment,
    sanitize,
    selfcheck,
    tests,
)
from bench.gpu.commands import Runner
from bench.gpu.tables import summary

# Of ten minutes, some go to the interpreter's start and to whatever calls it.
BUDGET_S = 560
# Enough for any step on a busy machine: a rehearsal shows that steps run, not how long they take on a GPU.
REHEARSED_STEP_S = 300
SETS = ("--sets", "resnet50", "vit_b16", "resnet20")
QUICK = [name for name in gpu_rivals.TITLES if name != "compiled"]
MODES_ROUNDS = ("--modes", "graph", "eager", "--rounds", "15")
REST = [option for path in FIRST_TESTS for option in ("--ignore", path)]


class Step(NamedTuple):
    """A step of the plan: seconds it may take at most, and those without which it is not begun."""

    name: str
    limit_s: float
    least_s: float
    action: Action


# The most valuable first. All of them down to "iteration" may take their whole limit without cost to the others.
PLAN = (
    Step("build", 80, 20, build),
    Step("selfcheck", 25, 10, selfcheck),
    Step("tests", 60, 20, tests(NATIVE, *FIRST_TESTS)),
    Step("step", 90, 45, benchmark("step", 15, *MODES_ROUNDS, *SETS, "--variants", *QUICK)),
    Step("memcheck", 45, 20, sanitize("memcheck")),
    Step("counters", 45, 25, counters),
    Step("iteration", 60, 40, benchmark("iteration", 15, "--models", "resnet50", "--batches", "256")),
    Step("native", 90, 25, tests(NATIVE, *REST)),
    Step("triton", 60, 25, tests(TRITON)),
    Step("racecheck", 45, 20, sanitize("racecheck")),
    Step("synccheck", 45, 20, sanitize("synccheck")),
    Step("initcheck", 45, 20, sanitize("initcheck")),
    # All variants again, as the newest row of each counts and holds the ratios of its own rounds.
    Step(
        "compiled",
        60,
        45,
        benchmark("step", 15, *MODES_ROUNDS, "--sets", "resnet50", "--dtypes", "fp32", "--compile-seconds", "25"),
    ),
)


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    state: str
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name:10} {self.state:8} {self.seconds:5.0f} s  {self.note}".rstrip()


def time_for(step: Step, left_s: float, later: Sequence[Step]) -> float:
    """Return the seconds for a step: its limit, or what is left beyond the least of later ones; 0: too little."""
    seconds = min(step.limit_s, left_s - sum(other.least_s for other in later))
    return seconds if seconds >= step.least_s else 0.0


def run_plan(steps: Sequence[Step], runner: Runner, budget_s: float, report: Callable[[list[Outcome]], None]) -> None:
    """Run the steps, each within what is left of the budget, and report all outcomes so far as each begins and ends."""
    end = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for number, step in enumerate(steps):
        begin = time.monotonic()
        seconds = time_for(step, end - begin, steps[number + 1 :])
        result = Result(SKIPPED, "the time is up")
        if seconds > 0:
            report([*outcomes, Outcome(step.name, "begun", 0.0, f"at most {seconds:.0f} s")])
            try:
                result = step.action(runner, seconds)
            except Exception as error:
                result = Result(FAILED, records.reason(error))
        outcomes.append(Outcome(step.name, result.state, time.monotonic() - begin, result.note))
        report(outcomes)


class Report:
    """Writes summary.txt anew and prints the last outcome."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.failed = False
        self.text = ""

    def __call__(self, outcomes: list[Outcome]) -> None:
        try:
            tables = summary(records.read(self.out))
        except Exception as error:  # a row that was cut off must not cost the steps to come
            tables = f"no tables: {records.reason(error)}"
        self.text = "\n".join([*map(str, outcomes), "", tables])
        self.failed = any(one.state == FAILED for one in outcomes)
        (self.out / "summary.txt").write_text(self.text + "\n", encoding="utf-8")
        print(outcomes[-1], flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    names = [step.name for step in PLAN]
    parser = flags.parser("gpu", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and rows; it is made")
    parser.add_argument(
        "--steps", nargs="+", choices=names, default=names, metavar="NAME", help=f"{', '.join(names)} (default: all)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all")
    help_text = f"on the CPU, with stand-ins; {REHEARSED_STEP_S} s for each step in place of the budget"
    parser.add_argument("--rehearse", action="store_true", help=help_text)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the plan; 1 if any step failed, or there is no GPU."""
    options = parse_arguments(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("No GPU: torch sees no CUDA device, and everything here needs one.", file=sys.stderr)
        return 1
    # Both end the running command. Commands would also inherit that SIGINT is ignored, as it is for a background job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out)
    steps, budget_s = [step for step in PLAN if step.name in options.steps], options.budget
    if options.rehearse:
        steps = [step._replace(limit_s=REHEARSED_STEP_S, least_s=0) for step in steps]
        budget_s = REHEARSED_STEP_S * len(steps)
    run_plan(steps, Runner(out, environment(options.rehearse), options.rehearse), budget_s, report)
    print(f"\n{report.text}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
