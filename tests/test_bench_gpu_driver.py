"""What `make gpu` does, without a GPU: its plan, its budget, its logs, and how it judges what it ran."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from bench import gpu

ROOT = Path(__file__).parent.parent


class Clock:
    """A clock that only steps move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def action(self, name: str, takes: float, state: str = gpu.OK):
        def act(runner, seconds):
            self.now += min(takes, seconds)
            return gpu.Outcome(name, state, min(takes, seconds))

        return act


NAMES = [step.name for step in gpu.PLAN]


def test_the_plan_is_the_documented_one():
    assert ["build", "selfcheck", "tests", *gpu.TOOLS, "counters", "step", "iteration"] == NAMES
    assert gpu.ACTIONS.keys() == set(NAMES)
    assert all(step.least_s > gpu.SLACK_S.get(step.name, 0) for step in gpu.PLAN)


def test_steps_that_use_all_they_get_end_within_the_budget():
    clock = Clock()
    outcomes = gpu.carry_out(NAMES, None, gpu.BUDGET_S, {n: clock.action(n, 1e9) for n in NAMES}, clock)
    assert [one.state for one in outcomes] == [gpu.OK] * len(NAMES)
    assert clock.now - 100.0 <= gpu.BUDGET_S
    assert all(one.seconds >= step.least_s for one, step in zip(outcomes, gpu.PLAN, strict=True))


def test_steps_are_skipped_when_the_budget_is_used_up():
    clock = Clock()
    outcomes = gpu.carry_out(["build", "step"], None, 30, {n: clock.action(n, 1e9) for n in NAMES}, clock)
    assert [(one.name, one.state, one.note) for one in outcomes] == [
        ("build", gpu.SKIPPED, "the time is up"),
        ("step", gpu.SKIPPED, "the time is up"),
    ]


def test_a_failure_does_not_stop_the_steps_after_it():
    clock = Clock()
    actions = {n: clock.action(n, 1, gpu.FAILED if n == "build" else gpu.OK) for n in NAMES}
    states = [one.state for one in gpu.carry_out(NAMES, None, gpu.BUDGET_S, actions, clock)]
    assert states == [gpu.FAILED] + [gpu.OK] * (len(NAMES) - 1)


def test_without_a_gpu_the_driver_says_so_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("No GPU: torch sees no CUDA device")
    assert not (tmp_path / "out").exists()


def test_commands_are_logged_limited_and_ended(tmp_path):
    runner = gpu.Runner(tmp_path, {"PATH": "/usr/bin:/bin"})
    assert runner.run(["sh", "-c", "echo $MORE; exit 3"], "a.log", 10, MORE="words") == (
        3,
        "$ sh -c echo $MORE; exit 3\nwords\n",
    )
    code, output = runner.run(["sh", "-c", "echo before; sleep 60; echo after"], "a.log", 0.3)
    assert code is None
    assert "\nbefore\n" in output
    assert "\nafter\n" not in output
    assert (tmp_path / "a.log").read_text().count("$ sh") == 2


def test_logs_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LARGEST_LOG", 1000)
    runner = gpu.Runner(tmp_path, {"PATH": "/usr/bin:/bin"})
    _, output = runner.run(["sh", "-c", "seq 1 2000; echo the end"], "a.log", 10)
    assert "\n999\n" in output
    kept = (tmp_path / "a.log").read_text()
    assert len(kept) < 1100
    assert kept.endswith("the end\n")


OURS = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at fused_sam::norm()+0x10\n"
THEIRS = OURS.replace("fused_sam", "at::native")
END = "\n24 passed\n========= ERROR SUMMARY: 1 error\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "state"),
    [
        ("memcheck", 0, "24 passed\n========= ERROR SUMMARY: 0 errors\n", gpu.OK),
        ("memcheck", 9, OURS + END, gpu.FAILED),
        ("memcheck", 0, "24 skipped\n", gpu.FAILED),
        ("memcheck", None, "", gpu.FAILED),
        ("initcheck", 9, THEIRS + END, gpu.OK),
        ("initcheck", 9, THEIRS + OURS + END, gpu.FAILED),
    ],
)
def test_what_a_sanitizer_says_is_judged(tool, code, output, state):
    assert gpu.judge(tool, code, output, 1.0).state == state


def test_sanitizers_without_the_tool_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda *arguments, **options: None)
    outcome = gpu.sanitize("memcheck")(gpu.Runner(tmp_path, {}), 1.0)
    assert (outcome.state, outcome.note) == (gpu.SKIPPED, "compute-sanitizer is not installed")


def test_the_sanitized_tests_exist():
    tests = "".join((ROOT / name).read_text() for name in gpu.SANITIZED)
    selected = re.findall(r"test_\w+", gpu.SELECTION)
    assert selected
    for name in selected:
        assert f"def {name}" in tests


@pytest.mark.parametrize(
    ("said", "state"), [("5 passed, 3 skipped in 1s", gpu.OK), ("8 skipped in 1s", gpu.FAILED), ("", gpu.FAILED)]
)
def test_tests_that_were_all_skipped_are_no_success(monkeypatch, tmp_path, said, state):
    monkeypatch.setattr(gpu.Runner, "run", lambda self, *arguments, **environment: (0, f"$ pytest\n{said}\n"))
    outcome = gpu.tests(gpu.Runner(tmp_path, {}), 10)
    assert outcome.state == state
    assert said in outcome.note
