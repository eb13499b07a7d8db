"""What `make gpu` promises, without a GPU: the most valuable first, nothing lost, and every step's command in order."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from bench.gpu import __main__ as gpu
from bench.gpu import actions, commands
from bench.gpu.actions import FAILED, OK, SKIPPED

ROOT = Path(__file__).parent.parent
HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
ENDS_WELL = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
print(*range(2000), sep=chr(10), flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("all that is known")
"""
TESTS = """
import time
def test_wrong():
    assert 1 == 2
def test_hangs():
    time.sleep(600)
def test_afterwards():
    pass
"""


def runner(out: Path) -> commands.Runner:
    return commands.Runner(out, actions.environment(rehearse=True))


def step(name: str, code: str, limit_s: float = 300) -> gpu.Step:
    def act(runner, seconds):
        return actions.verdict(runner.run([sys.executable, "-c", code], "a.log", seconds, grace_s=1)[0])

    return gpu.Step(name, limit_s, 0, act)


def test_steps_that_take_all_they_may_leave_time_for_the_others():
    left, whole = gpu.BUDGET_S, []
    for number, one in enumerate(gpu.PLAN):
        seconds = gpu.time_for(one, left, gpu.PLAN[number + 1 :])
        assert seconds >= one.least_s, one.name
        left -= seconds
        whole += [one.name] if seconds == one.limit_s else []
    assert left >= 0
    assert whole[:7] == ["build", "selfcheck", "tests", "step", "memcheck", "counters", "iteration"]


def test_without_time_steps_are_skipped(tmp_path):
    report = gpu.Report(tmp_path)
    gpu.run_plan(gpu.PLAN[:2], runner(tmp_path), 5, report)
    assert report.text.count(f"{SKIPPED}      0 s  the time is up") == 2
    assert not report.failed


def test_what_hangs_crashes_or_fails_costs_the_others_nothing(tmp_path):
    def fail(runner, seconds):
        raise ValueError("a mistake of this program's")

    steps = [step("hangs", HANGS, 4), step("crashes", CRASHES), gpu.Step("fails", 9, 0, fail), step("works", "")]
    (tmp_path / "gpu.jsonl").write_text('{"kind": "gpu_st')  # a row that was cut off
    report, seen = gpu.Report(tmp_path), []

    def look(outcomes):
        report(outcomes)
        seen.append([line.split()[:2] for line in (tmp_path / "summary.txt").read_text().splitlines()])

    gpu.run_plan(steps, runner(tmp_path), 600, look)
    states = [["hangs", FAILED], ["crashes", FAILED], ["fails", FAILED], ["works", OK]]
    for number in range(len(steps)):
        assert seen[2 * number][: number + 1] == [*states[:number], [steps[number].name, "begun"]]
        assert seen[2 * number + 1][: number + 1] == states[: number + 1]
    for words in ("not done in time", "exit code -11", "ValueError: a mistake", "no tables: ValueError: Invalid row"):
        assert words in report.text


def test_a_command_is_interrupted_before_it_is_killed_and_its_log_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "LARGEST_LOG", 1000)
    code, output = runner(tmp_path).run([sys.executable, "-c", ENDS_WELL], "a.log", 66, grace_s=60)
    assert code is None
    assert "\n999\n" in output
    assert output.endswith("all that is known\n")
    assert len((tmp_path / "a.log").read_text()) < 1100


@pytest.mark.slow
def test_a_failure_is_written_at_once_and_a_test_that_hangs_costs_itself(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    variables = actions.tests_environment(runner(tmp_path), 5)
    command = [sys.executable, "-m", "pytest", *actions.PYTEST_OPTIONS, "-n1", "-c/dev/null", str(tmp_path)]
    code, output = runner(tmp_path).run(command, "tests.log", 300, **variables)
    assert code == 1
    assert actions.counts(output).startswith("2 failed, 1 passed")
    failures = (tmp_path / "failures.log").read_text()
    for words in ("test_wrong (call)", "assert 1 == 2", "in test_hangs", "crashed while running"):
        assert words in failures


def test_every_kernel_has_a_sanitized_test():
    """By name; the rehearsal runs them."""
    for path, _, name in (one.partition("::") for one in actions.SANITIZED_TESTS):
        assert f"\ndef {name}(" in (ROOT / path).read_text()


@pytest.mark.skipif("FUSED_SAM_SOAK" not in os.environ, reason="a minute of builds and of other tests: make soak")
def test_the_rehearsal_runs_every_kind_of_step(tmp_path):
    pytest.importorskip("fused_sam._native", reason="the native core is not built")
    steps = ["build", "selfcheck", "tests", "step", "memcheck", "counters"]
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path), "--steps", *steps]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [line.split()[:2] for line in (tmp_path / "summary.txt").read_text().splitlines()[: len(steps)]]
    assert states == [[name, SKIPPED if name == "counters" else OK] for name in steps]
    assert len(list(tmp_path.iterdir())) <= 7
    assert '"kind": "smoke"' in (tmp_path / "gpu.jsonl").read_text()


OURS = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at fused_sam::norm()+0x10\n"
THEIRS = OURS.replace("fused_sam", "at::native")
END = "\n24 passed in 1.00s\n========= ERROR SUMMARY: 1 error\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "state"),
    [
        ("memcheck", 0, "24 passed in 1.00s\n========= ERROR SUMMARY: 0 errors\n", OK),
        ("memcheck", 9, OURS + END, FAILED),
        ("memcheck", 0, "24 skipped in 1.00s\n", FAILED),
        ("memcheck", None, "", FAILED),
        ("initcheck", 9, THEIRS + END, OK),
        ("initcheck", 9, THEIRS + OURS + END, FAILED),
        ("initcheck", 9, THEIRS + "2 failed, 22 passed in 1.00s\n", FAILED),
    ],
)
def test_what_a_sanitizer_reports(tool, code, output, state):
    assert actions.parse_report(tool, code, output).state == state


@pytest.mark.parametrize("module", ["__main__", "step", "iteration", "counters"])
def test_without_a_gpu_it_says_so_at_once(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        raise SystemExit(importlib.import_module(f"bench.gpu.{module}").main(["--out", str(tmp_path / "out")]))
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("No GPU: torch sees no CUDA device")
    assert not (tmp_path / "out").exists()
