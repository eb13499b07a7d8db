"""The benchmarks for a GPU as far as a CPU can try them: rows, arithmetic, tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

pytest.importorskip("rich")

from bench import (
    gpu_iteration,
    gpu_rivals,
    gpu_step,
    gpu_subjects,
    gpu_tables,
    gpu_timing,
    records,
    report,
    rivals,
)
from bench.gpu import PLAN
from bench.harness import FLOOR
from bench.shapes import GPU_SETS
from bench.vision_models import MODELS

TINY = {"resnet20": lambda: [(3, 5), (7,), (1,)]}
TINY_PARAMETERS = 23
QUICK = [name for name in gpu_rivals.RIVALS if name != "compiled" and gpu_rivals.RIVALS[name].available()]
L2_OF_AN_H200 = 60 << 20


def step_rows(out: Path | None = None, variants: tuple[str, ...] = ("fused_sam_eager", "eager_sgd")) -> list[dict]:
    arguments = ["--device", "cpu", "--sets", "resnet20", "--dtypes", "fp32", "--rounds", "2", "--variants", *variants]
    options = gpu_step.parse_arguments([*arguments, *(["--out", str(out)] if out else [])])
    return gpu_step.run(options, Console(quiet=True), TINY)


def test_step_rows_are_well_formed(tmp_path):
    out = tmp_path / "rows.jsonl"
    made = {row["variant"]: row for row in step_rows(out)}
    assert made.keys() == {"fused_sam_eager", "eager_sgd", FLOOR}
    for row in made.values():
        assert row["failed"] is None
        assert row["valid"]
        assert row["rounds"] == 2
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["launches"] is None
    assert made["fused_sam_eager"]["ratio_to_rival"].keys() == {"eager_sgd"}
    assert made["eager_sgd"]["bytes"] == 92 * TINY_PARAMETERS
    assert [json.loads(line)["variant"] for line in out.read_text().splitlines()] == list(made)


def test_a_cpu_never_passes_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert {row["kind"] for row in step_rows()} == {"smoke"}
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_the_benchmarks_say_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main in (gpu_step.main, gpu_iteration.main):
        with pytest.raises(SystemExit) as caught:
            main([])
        assert caught.value.code == 1
        assert capsys.readouterr().err == "No GPU: torch sees no CUDA device.\n"


def test_a_variant_that_fails_has_a_row_that_says_why(monkeypatch):
    def build(params):
        raise RuntimeError("out of luck\nsecond line")

    monkeypatch.setitem(gpu_rivals.RIVALS, "eager_sgd", gpu_rivals.GpuVariant("broken", build, 0))
    failed = {row["variant"]: row["failed"] for row in step_rows()}
    assert failed == {"fused_sam_eager": None, FLOOR: None, "eager_sgd": "RuntimeError: out of luck"}


def test_a_variant_that_fails_in_a_later_round_is_left_out_of_the_ratios(monkeypatch):
    class Tiring(rivals.PlainSGD):
        steps = 0

        def first_step(self, zero_grad=False):
            self.steps += 1
            if self.steps > gpu_step.WARM_UP_ROUNDS + 2:
                raise RuntimeError("tired")
            super().first_step(zero_grad)

    variant = gpu_rivals.GpuVariant("tiring", lambda params: Tiring(params, **rivals.SGD_OPTIONS), 20)
    monkeypatch.setitem(gpu_rivals.RIVALS, "eager_sgd", variant)
    made = {row["variant"]: row for row in step_rows()}
    assert made["eager_sgd"]["failed"] == "RuntimeError: tired"
    assert made["fused_sam_eager"]["ratio_to_rival"] == {}


def test_graph_mode_names_what_a_graph_cannot_hold():
    job = gpu_step.Job("resnet20", TINY["resnet20"](), "fp32", "graph", "cpu", 1, dict(gpu_rivals.RIVALS))
    job.prepare(gpu_rivals.CompileBudget(0))
    assert job.failed["eager_sgd"] == gpu_rivals.REBINDS
    assert job.failed[gpu_rivals.FOREACH] == gpu_rivals.READS
    assert job.failed["compiled"] == "RuntimeError: no time left to compile"
    assert job.failed["eager_copy_sgd"] == "RuntimeError: a CUDA graph needs a CUDA device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_moves_the_bytes_of_fused_sam(dtype):
    floor = gpu_subjects.Floor(TINY["resnet20"](), dtype, "cpu", copies=3)
    assert floor.source.numel() == 3 * TINY_PARAMETERS
    assert floor.moved_bytes == 10 * dtype.itemsize * TINY_PARAMETERS


def test_small_sets_are_copied_until_they_exceed_the_cache():
    resnet20, resnet50 = GPU_SETS["resnet20"](), GPU_SETS["resnet50"]()
    copies = gpu_subjects.copies_for(resnet20, torch.float32, L2_OF_AN_H200)
    assert copies * 4 * 4 * 272_474 >= 3 * L2_OF_AN_H200 > (copies - 1) * 4 * 4 * 272_474
    assert gpu_subjects.copies_for(resnet50, torch.float32, L2_OF_AN_H200) == 1
    assert gpu_subjects.copies_for(resnet50, torch.float32, 0) == 1


@pytest.mark.parametrize("name", QUICK)
def test_every_rival_makes_the_same_step(name):
    oracle = rivals.PlainSGD if name == gpu_rivals.SCALE else rivals.EagerSAM
    assert rivals.computes_the_step(gpu_rivals.RIVALS[name].build, torch.float32, oracle=oracle)


def test_the_rival_without_host_read_makes_the_same_step_in_16_bit():
    def build(params):
        return rivals.ForeachSAM(params, sync=False, **rivals.SGD_OPTIONS, foreach=True)

    assert rivals.computes_the_step(build, torch.bfloat16)


def graph_subject(name: str) -> gpu_subjects.GraphSubject:
    weights, first, second = rivals.small_problem(torch.float32)
    return gpu_subjects.GraphSubject(gpu_rivals.RIVALS[name].build, [weights], [(first, second)], "cpu")


def test_the_check_of_replays_notices_a_step_too_few():
    subject = graph_subject("foreach_nosync_sgd_fused")
    for _ in range(4):
        subject.steps()
    params = subject.members[0].params
    assert gpu_subjects.is_after(params, 4, torch.float32)
    assert not gpu_subjects.is_after(params, 5, torch.float32)


def test_rebinding_moves_the_weights_away_from_their_addresses():
    """Why a graph cannot hold eager SAM as it is, and can hold the form that copies."""
    addresses = {}
    for name in ("eager_sgd", "eager_copy_sgd"):
        subject = graph_subject(name)
        before = [p.data_ptr() for p in subject.members[0].params]
        subject.steps()
        addresses[name] = [p.data_ptr() for p in subject.members[0].params] == before
    assert addresses == {"eager_sgd": False, "eager_copy_sgd": True}


def test_a_compilation_that_takes_too_long_is_ended():
    def compile_forever() -> None:
        while True:
            pass

    budget = gpu_rivals.CompileBudget(0.05)
    with pytest.raises(RuntimeError, match="compilation not done in"):
        budget.run(gpu_rivals.RIVALS["compiled"], compile_forever)
    assert budget.left_s <= 0
    assert budget.run(gpu_rivals.RIVALS["eager_sgd"], lambda: "not limited") == "not limited"


def event(name: str, start: int, device: DeviceType = DeviceType.CPU, mark: bool = False, ns: int = 1) -> object:
    values = {"name": name, "start_ns": start, "device_type": device, "is_user_annotation": mark, "duration_ns": ns}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_events_are_counted_within_the_label():
    cuda = DeviceType.CUDA
    events = [
        event("cudaDeviceSynchronize", 1),
        event(gpu_timing.LABEL, 10, ns=90),
        event("cudaLaunchKernel", 20),
        event("cudaStreamSynchronize", 30),
        event(gpu_timing.LABEL, 25, cuda, mark=True),
        event("Optimizer.step#SGD.step", 25, cuda, mark=True),
        event("void multi_tensor_apply_kernel", 40, cuda),
        event("Memcpy DtoH (Device -> Pageable)", 50, cuda),
        event("late_kernel", 150, cuda),  # launched within the label, run after it
        event("cudaDeviceSynchronize", 160),
    ]
    assert gpu_timing.tally(events) == gpu_timing.Counts(launches=2, memory_operations=1, syncs=1)


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_parameters_of_their_sets(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert [tuple(p.shape) for p in model.parameters()] == GPU_SETS[name]()


def test_iterations_are_told_by_stage(monkeypatch):
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, gpu_iteration.CLASSES, 32)

        def forward(self, x):
            return self.layer(x).flatten(1)

    monkeypatch.setitem(gpu_iteration.MODELS, "resnet50", Tiny)
    options = gpu_iteration.parse_arguments(["--device", "cpu", "--smoke", "--models", "resnet50"])
    made = {row["variant"]: row for row in gpu_iteration.run(options, lambda line: None)}
    assert {"fused_sam_eager", "eager_sgd", gpu_iteration.TWICE, gpu_rivals.SCALE} <= made.keys()
    for row in made.values():
        assert (row["failed"], row["kind"]) == (None, "smoke")
        assert sum(row[f"{stage}_s"] for stage in gpu_iteration.STAGES) == pytest.approx(row["median_s"], rel=0.5)
    assert gpu_iteration.TWICE in made["eager_sgd"]["ratios"]


MACHINE = {"gpu": "a GPU", "driver": "1", "sms": 2}
VERSIONS = {"python": "3", "torch": "2", "cuda": "13", "triton": "3", "commit": "abc"}
SPREAD = {"median": 2.5, "p20": 2.0, "p80": 3.0}


def made_up_step(variant: str, mode: str = "eager", **more: object) -> dict:
    times = {"median_s": 1e-3, "p20_s": 9e-4, "p80_s": 2e-3, "host_s": 5e-4, "first_s": None, "second_s": None}
    counts = {"launches": 3, "memory_operations": 0, "syncs": 0, "bytes": 10**9}
    row = {"kind": "gpu_step", "date": "2000-01-01", "machine": MACHINE, "versions": VERSIONS, "set": "resnet50"}
    row |= {"dtype": "fp32", "mode": mode, "variant": variant, "failed": None, "valid": True}
    return row | times | counts | {"ratio_to_rival": {}, "ratio_to_floor": None} | more


def made_up_rows() -> list[dict]:
    ratios = {"eager_sgd": SPREAD, "eager_copy_sgd": SPREAD}
    iteration = {"kind": "gpu_iteration", "model": "vit_b16", "batch": 64, "median_s": 0.5, "p20_s": 0.4, "p80_s": 0.6}
    iteration |= {"forward_s": 0.1, "backward_s": 0.3, "optimizer_s": 0.1, "peak_over_sgd_bytes": 123_000_000}
    iteration |= {"date": "2000-01-02", "machine": MACHINE, "versions": VERSIONS, "failed": None}
    return [
        made_up_step("fused_sam_triton", ratio_to_rival=ratios),
        made_up_step("fused_sam_triton", "graph", ratio_to_rival=ratios, ratio_to_floor=SPREAD),
        made_up_step("eager_sgd", valid=False),
        made_up_step("eager_sgd", "graph", failed="because | of this"),
        made_up_step(FLOOR),
        iteration | {"variant": "fused_sam_triton", "ratios": {gpu_iteration.TWICE: SPREAD, "eager_sgd": SPREAD}},
        iteration | {"variant": gpu_iteration.TWICE, "ratios": {}},
        iteration | {"variant": "eager_sgd", "failed": "OutOfMemoryError: of it"},
    ]


def test_pages_say_that_there_are_no_rows_yet():
    page = "<!-- bench:gpu:start -->\nstale\n<!-- bench:gpu:end -->"
    assert gpu_tables.NOTHING_YET in report.filled(page, [])


def test_tables_of_rows(tmp_path):
    records.write_rows(made_up_rows(), tmp_path / "rows.jsonl")
    rows = report.latest(records.read(tmp_path))
    short, steps, iterations, _ = (render(rows) for render in gpu_tables.BLOCKS.values())
    assert "| ResNet-50 fp32 | 1000 FusedSAM(triton) | 500 | 3 | **2.50** (2.00 to 3.00) |  | 1000 |" in short
    assert "| ViT-B/16, batch 64 | 500 (400 to 600) | **2.50** (2.00 to 3.00) |  | **0.40** | 123 |" in short
    assert f"eager SAM + SGD {gpu_tables.WRONG} | 1000 (900 to 2000) | **2.50** (2.00 to 3.00) |" in steps
    assert "| because / of this |" in steps
    assert "| ViT-B/16 | 64 | SGD(fused), two passes | 500 (400 to 600) | 100.00 | 300.00 | 100.00 |" in iterations
    for text in (short, steps, iterations):
        assert "a GPU, 2 SMs, driver 1; Python 3, torch 2, CUDA 13, triton 3; commit abc; 2000-01-0" in text
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == (2 if text is short else 1)


def test_pictures_of_rows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = made_up_rows()
    for name, draw in list(report.PLOTS.items())[1:]:
        assert not draw([], tmp_path / name)
        assert draw(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_the_summary_of_a_full_run_is_short():
    rows = [
        made_up_step("fused_sam", mode, set=name, dtype=dtype)
        for name in GPU_SETS
        for dtype in gpu_step.DEFAULT_DTYPES
        for mode in gpu_rivals.MODES
    ]
    iteration = next(row for row in made_up_rows() if row["kind"] == "gpu_iteration")
    rows += [iteration | {"model": model, "batch": batch} for model in MODELS for batch in gpu_iteration.BATCHES]
    assert len(gpu_tables.summary(rows).splitlines()) + len(PLAN) + 1 <= 40
