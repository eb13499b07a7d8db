"""What the measurements of the host's part of a step measure, and what is made of it."""

from __future__ import annotations

import gc
import shutil
import sys

import pytest
import torch

from bench import records, tables
from bench.speed import callgrind, counted, host_time, instructions, rivals
from bench.speed.callgrind import Call, Profile
from bench.speed.harness import Subject

SPREAD = {"median": 2.0, "p20": 1.9, "p80": 2.1}
ROW = {"date": "2026-01-01", "machine": {}, "versions": {}, "dtype": "fp32", "threads": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_left_as_by_a_backward_pass(dtype):
    one = Subject(lambda params: None, [(3, 5), (1,), (7,)], dtype)
    with torch.no_grad():
        one.params[0].set_(torch.randn(5, 3).to(dtype).t())  # transposed: its gradient is to be, too

    def python_tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    expected = [view.clone() for view in one.grads.views]
    gc.collect()
    before = python_tensors()
    one.assign_gradients()
    assert python_tensors() == before
    for p, value in zip(one.params, expected, strict=True):
        assert (p.grad.dtype, p.grad.stride()) == (dtype, p.stride())
        torch.testing.assert_close(p.grad, value, rtol=0, atol=0)
        p.grad.zero_()  # memory of its own: the values that gradients are made from stay
    one.assign_gradients()
    torch.testing.assert_close([p.grad for p in one.params], expected, rtol=0, atol=0)


def measure_here(tasks, rounds, threads, tick):
    """Measure in this process, without waiting for others to begin."""
    subjects = {task.variant: Subject(rivals.find(task.variant).build, task.shapes, task.dtype) for task in tasks}
    return {count: {name: [one.run() for _ in range(rounds)] for name, one in subjects.items()} for count in threads}


def test_host_times_are_split_by_half_and_set_against_rivals(monkeypatch, tmp_path):
    monkeypatch.setattr(host_time, "measure", measure_here)
    asked = ["--sets", "resnet20", "--variants", rivals.OURS, rivals.TWICE, "--rounds", "2", "--out"]
    assert host_time.main([*asked, str(tmp_path / "cpu_host.jsonl")]) == 0
    ours, twice = rows = records.read(tmp_path)
    assert [row["variant"] for row in rows] == [rivals.OURS, rivals.TWICE]
    for row in rows:
        assert (row["set"], row["tensors"], row["rounds"]) == ("65 x 1", 65, 2)
        assert row["first_s"] + row["second_s"] == pytest.approx(row["median_s"], rel=1e-2)
    assert ours["ratio_to_rival"].keys() == {rivals.TWICE}
    assert twice["ratio_to_rival"] == {}


def test_rows_without_halves_stay_in_the_tables_of_host_times():
    times = {"median_s": 1e-3, "p20_s": 9e-4, "p80_s": 2e-3}
    halves = {"first_s": 4e-4, "second_s": 6e-4}
    ratios = {"ratio_to_rival": {"eager_sgd": SPREAD}}
    rows = [
        ROW | times | ratios | {"kind": "host", "set": "161 x 1", "variant": rivals.OURS},
        ROW | times | {"ratio_to_rival": {}} | {"kind": "host", "set": "161 x 1", "variant": "eager_sgd"},
        ROW | times | halves | ratios | {"kind": "host", "set": "10000 x 1", "variant": rivals.OURS},
    ]
    old, many = tables.host_sets(rows).splitlines()[2:4]
    assert old == "| 161, as ResNet-50 | 1000 (900 to 2000) |  |  | 6.21 | **2.00** (1.90 to 2.10) |"
    assert many == "| 10,000 | 1000 (900 to 2000) | 400 | 600 | 0.10 | **2.00** (1.90 to 2.10) |"
    assert tables.host(rows).splitlines()[2:4] == [
        "| FusedSAM | 1000 (900 to 2000) |  |  |  |",
        "| eager SAM + SGD | 1000 (900 to 2000) |  |  | **2.00** (1.90 to 2.10) |",
    ]


class Log:
    """Keeps what valgrind is asked for."""

    def __init__(self):
        self.events = []

    def start(self):
        self.events.append("start")

    def stop(self):
        self.events.append("stop")

    def dump(self, label):
        self.events.append(label)


class Halves:
    """Takes the gradients, as an optimizer would."""

    def __init__(self, params, log):
        self.params, self.log = params, log

    def first_step(self, zero_grad):
        assert zero_grad
        assert all(p.grad is not None for p in self.params)
        self.log.events.append("half")
        for p in self.params:
            p.grad = None

    second_step = first_step


def test_only_the_halves_of_warm_steps_are_counted():
    log = Log()
    one = Subject(lambda params: Halves(params, log), [(1,)] * 3, torch.float32)
    make_gradients = one.assign_gradients
    one.assign_gradients = lambda: (log.events.append("gradients"), make_gradients())
    counted.count(one, log)
    steps = []
    for half in counted.HALVES:
        steps += ["gradients", "start", "half", "stop", counted.label(3, half)]
    assert log.events == ["gradients", "half"] * 2 * counted.WARM_UP_STEPS + steps * counted.STEPS


PROFILE = """# callgrind format
version: 1
desc: Trigger: Client Request: 161 first
positions: line
events: Ir

ob=(1) core.so
fn=(1) fused_sam::norm()
10 5
cfn=(2) fused_sam::cpu::norm(int)
calls=3 20
10 700
cob=(2) other.so
cfn=(3) operator delete(void*)
calls=1 4
+2 40

fn=(2)
20 100
cfn=(4) void fused_sam::cpu::avx2::sum<float>(int)
calls=3 0
20 600

fn=(4)
0 600

fn=(3)
4 40

totals: 745
"""


def test_a_profile_tells_what_calls_cost_without_counting_twice(tmp_path):
    path = tmp_path / "callgrind.out.1"
    path.write_text(PROFILE, encoding="utf-8")
    profile = callgrind.read(path)
    assert (profile.label, profile.total) == ("161 first", 745)
    assert Call("fused_sam::norm()", "operator delete(void*)", 40) in profile.calls
    assert profile.inside(instructions.PARTS["kernels"]) == 700
    assert profile.inside(instructions.PARTS["freeing"]) == 0


def test_counts_of_one_and_of_many_tensors_give_fixed_and_per_tensor():
    steps, empty = counted.STEPS, 30

    def profile(tensors, half):
        fixed, each = {"first": (1000, 20), "second": (500, 10)}[half]
        calls = [
            Call("a", "fused_sam::cpu::norm(int)", steps * (7 + 4 * tensors)),
            Call("a", "c10::TensorImpl::~TensorImpl()", steps * 3 * tensors),
        ]
        name = counted.label(tensors, half)
        return name, Profile(name, steps * (fixed + each * tensors) + empty, calls)

    profiles = dict(profile(n, half) for n in (1, 11) for half in counted.HALVES)
    row = instructions.figures(profiles | {counted.EMPTY: Profile(counted.EMPTY, empty, [])}, 11)
    assert row["first"] == {"total": 1220, "fixed": 1000, "per_tensor": 20}
    assert row["step"] == {"total": 1830, "fixed": 1500, "per_tensor": 30}
    assert row["kernels"] == {"total": 102, "fixed": 14, "per_tensor": 8}
    assert row["freeing"] == {"total": 66, "fixed": 0, "per_tensor": 6}
    common = ROW | {"kind": "instructions", "set": "11 x 1", "tensors": 11, "valgrind": "valgrind-3"}
    twice = row | {"step": {"total": 3660, "fixed": 3000, "per_tensor": 60}}
    text = tables.instructions([common | row | {"variant": rivals.OURS}, common | twice | {"variant": rivals.TWICE}])
    assert text.splitlines()[2:4] == [
        "| FusedSAM | 11 | 1,830 | 1,220 | 610 |  | 1,500 | 30 | 8 | 6 |",
        "| SGD(fused) twice | 11 | 3,660 | 1,220 | 610 | **2.00** | 3,000 | 60 |  | 6 |",
    ]


def test_without_valgrind_one_sentence_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", "")
    out = tmp_path / "rows.jsonl"
    assert instructions.main(["--variants", rivals.OURS, "--out", str(out)]) == 1
    sentence = "valgrind was not found, which counts the instructions: install it and try again.\n"
    assert capsys.readouterr() == ("", sentence)
    assert not out.exists()


LOOPS = """
import itertools, sys
from bench.speed.callgrind import Library

control = Library(sys.argv[1])

def spin(times):
    for _ in itertools.repeat(None, times):
        pass

spin(100_000)
for times in (0, 1000, 2000, 2000):
    control.start()
    spin(times)
    control.stop()
    control.dump(f"{times} times")
if len(sys.argv) > 2:
    sys.exit(f"no {sys.argv[2]}")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_valgrind_counts_what_lies_between_the_requests(tmp_path):
    library = str(callgrind.build(tmp_path))
    command = [sys.executable, "-c", LOOPS, library]
    counted = callgrind.run(command, tmp_path / "run")
    none, once, twice = (counted[f"{times} times"].total for times in (0, 1000, 2000))
    assert once - none > 1000
    assert twice == pytest.approx(2 * none + 4 * (once - none), rel=0.05)
    with pytest.raises(callgrind.CallgrindError, match=r"failed under valgrind, exit status 1: no luck$"):
        callgrind.run([*command, "luck"], tmp_path / "broken")
