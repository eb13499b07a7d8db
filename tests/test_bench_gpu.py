"""The benchmarks for a GPU as far as a CPU can try them: rows, arithmetic, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("rich")

from bench import records, report
from bench.gpu import iteration as gpu_iteration
from bench.gpu import rivals as gpu_rivals
from bench.gpu import step as gpu_step
from bench.gpu import subjects as gpu_subjects
from bench.gpu import tables as gpu_tables
from bench.speed import rivals
from bench.speed.harness import FLOOR
from bench.speed.shapes import GPU_SETS

TINY = {"resnet20": lambda: [(3, 5), (7,), (1,)]}
TINY_PARAMETERS = 23
QUICK = [name for name in gpu_rivals.RIVALS if name != "compiled" and gpu_rivals.RIVALS[name].available()]
L2_OF_AN_H200 = 60 << 20


def step_rows(out: Path | None = None, variants: tuple[str, ...] = ("fused_sam_eager", "eager_sgd")) -> list[dict]:
    arguments = ["--device", "cpu", "--sets", "resnet20", "--dtypes", "fp32", "--rounds", "2", "--variants", *variants]
    options = gpu_step.parse_arguments([*arguments, *(["--out", str(out)] if out else [])])
    return gpu_step.run(options, Console(quiet=True), TINY)


def test_step_rows_are_well_formed_and_a_cpu_never_passes_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    out = tmp_path / "rows.jsonl"
    made = {row["variant"]: row for row in step_rows(out)}
    assert made.keys() == {"fused_sam_eager", "eager_sgd", FLOOR}
    for row in made.values():
        assert row["failed"] is None
        assert row["valid"]
        assert row["rounds"] == 2
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert (row["kind"], row["launches"]) == ("smoke", None)
    assert made["fused_sam_eager"]["ratio_to_rival"].keys() == {"eager_sgd"}
    assert made["eager_sgd"]["bytes"] == 92 * TINY_PARAMETERS
    assert not (tmp_path / "results").exists()
    assert [json.loads(line)["variant"] for line in out.read_text().splitlines()] == list(made)


def ending_with(error: BaseException) -> gpu_rivals.GpuVariant:
    """A variant whose second round ends so."""

    class Ending(rivals.PlainSGD):
        steps = 0

        def first_step(self, zero_grad=False):
            self.steps += 1
            if self.steps > gpu_step.WARM_UP_ROUNDS + 2:  # one more step before the rounds
                raise error
            super().first_step(zero_grad)

    return gpu_rivals.GpuVariant("ending", lambda params: Ending(params, **rivals.SGD_OPTIONS), 20)


def test_a_variant_that_fails_in_a_later_round_is_left_out_of_the_ratios(monkeypatch):
    monkeypatch.setitem(gpu_rivals.RIVALS, "eager_sgd", ending_with(RuntimeError("tired")))
    made = {row["variant"]: row for row in step_rows()}
    assert made["eager_sgd"]["failed"] == "RuntimeError: tired"
    assert made["fused_sam_eager"]["ratio_to_rival"] == {}


def test_an_interrupted_benchmark_leaves_the_rounds_it_has(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_rivals.RIVALS, "eager_sgd", ending_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        step_rows(tmp_path / "rows.jsonl")
    rounds = {row["variant"]: row["rounds"] for row in records.read(tmp_path)}
    assert rounds == {"fused_sam_eager": 1, "eager_sgd": 1, FLOOR: 1}


def test_graph_mode_names_what_a_graph_cannot_hold():
    budget = gpu_rivals.CompileBudget(0)
    job = gpu_step.Job("resnet20", TINY["resnet20"](), "fp32", "graph", "cpu", 1, dict(gpu_rivals.RIVALS), budget)
    job.prepare()
    assert job.failed["eager_sgd"] == gpu_rivals.REBINDS
    assert job.failed[gpu_rivals.FOREACH] == gpu_rivals.READS
    assert job.failed["compiled"] == "RuntimeError: no time left to compile"
    assert job.failed["eager_copy_sgd"] == "RuntimeError: a CUDA graph needs a CUDA device"


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


def test_a_compilation_that_takes_too_long_is_ended():
    def compile_forever() -> None:
        while True:
            pass

    budget = gpu_rivals.CompileBudget(0.05)
    with pytest.raises(RuntimeError, match="compilation not done in"):
        budget.run(gpu_rivals.RIVALS["compiled"], compile_forever)
    assert budget.left_s <= 0
    assert budget.run(gpu_rivals.RIVALS["eager_sgd"], lambda: "not limited") == "not limited"


def test_iterations_are_told_by_stage(monkeypatch):
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, gpu_iteration.CLASSES, 32)

        def forward(self, x):
            return self.layer(x).flatten(1)

    monkeypatch.setitem(gpu_iteration.MODELS, "resnet50", Tiny)
    options = gpu_iteration.parse_arguments(["--device", "cpu", "--smoke", "--models", "resnet50"])
    made = {row["variant"]: row for row in gpu_iteration.run(options, Console(quiet=True))}
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
