"""Counters of single kernels: what is asked of Nsight Compute, and how its answer is read. No GPU is needed."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

pytest.importorskip("rich")

from rich.console import Console

from bench import records, tables
from bench.gpu import counters as gpu_counters
from bench.gpu import tables as gpu_tables
from bench.gpu.counters import METRICS

HEAD = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size"]
UNITS_LINE = [""] * len(HEAD) + ["ns", "byte", "byte", "%", "%", "%"]
NATIVE = "void fused_sam::cuda::<unnamed>::norm_kernel<float, (fused_sam::DType)0>(Arguments<Tensor, 8>, double *)"


def output(*kernels: tuple[str, list[str]]) -> str:
    """As the tool prints it: its own lines, the program's, then the table."""
    lines = [[*HEAD, *METRICS.values()], UNITS_LINE]
    lines += [["0", "7", "python3", "host", name, "1", "7", "(256, 1, 1)", "(264, 1, 1)", *v] for name, v in kernels]
    table = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 7\nsaid by the program\n==PROF== Disconnected from process 7\n{table}\n"


NUMBERS = ["31,200", "102,228,128", "4,096", "88.5", "12.25", "n/a"]


def test_the_table_is_read_in_the_order_of_the_launches() -> None:
    first, second = gpu_counters.read(output((NATIVE, NUMBERS), ("perturb", ["1", "2", "3", "4", "5", "6"])))
    assert first == {
        "number": 0,
        "kernel": "norm_kernel",
        "grid": "(264, 1, 1)",
        "block": "(256, 1, 1)",
        "seconds": pytest.approx(31.2e-6),
        "read_bytes": pytest.approx(1.022e8),
        "written_bytes": 4096.0,
        "memory_busy": pytest.approx(0.885),
        "l2_hits": pytest.approx(0.1225),
        "occupancy": None,
    }
    assert (second["number"], second["kernel"], second["seconds"]) == (1, "perturb", pytest.approx(1e-9))
    assert [gpu_counters.scaled(first, name) for name in METRICS] == ["31.2", "102.2", "0.0", "88.5", "12.2", ""]
    assert "norm_kernel" in gpu_counters.describe(
        records.header("x") | first | {"set": "a", "dtype": "b", "variant": "c"}
    )


@pytest.mark.parametrize("said", ["", "==ERROR== The user does not have permission", '"ID","Name"\n"",""\n'])
def test_an_answer_without_a_table_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="Must hold a table"):
        gpu_counters.read(said)
    with pytest.raises(ValueError, match="Invalid unit 'fortnight' of gpu__time_duration"):
        gpu_counters.read(output((NATIVE, NUMBERS)).replace('"ns"', '"fortnight"'))


def made(monkeypatch: pytest.MonkeyPatch, *answers: object) -> tuple[list[records.Row], str]:
    """The rows of as many steps, each answered by an exception or an (exit code, output), and what was said."""
    given = iter(answers)

    def answer(*arguments: object, **options: object) -> SimpleNamespace:
        one = next(given)
        if isinstance(one, BaseException):
            raise one
        code, said = one  # type: ignore[misc]
        return SimpleNamespace(returncode=code, stdout=said, stderr="")

    monkeypatch.setattr(gpu_counters.subprocess, "run", answer)
    monkeypatch.setattr(records, "gpu_hardware", lambda: {"gpu": "a GPU", "sms": 132, "driver": "1"})
    monkeypatch.setattr(
        gpu_counters.gpu_rivals, "variants", lambda device, mode: {"fused_sam": 0, "fused_sam_triton": 0}
    )
    sets = ["resnet50", "vit_b16"][: max(1, len(answers) // 2)]
    options = SimpleNamespace(
        sets=sets,
        dtypes=["fp32"],
        variants=["fused_sam", "fused_sam_triton", "fused_sam_eager"],
        seconds=60.0,
        dry_run=True,
    )
    console = Console(record=True, width=400, quiet=False)
    return list(gpu_counters.run(options, console, "ncu")), console.export_text()


def test_what_fails_is_said_and_the_rest_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    good = output((NATIVE, NUMBERS))
    slow = subprocess.TimeoutExpired("ncu", 3.0)
    rows, said = made(monkeypatch, (9, "==ERROR== no permission"), (0, good), slow, (0, "no table"))
    assert [(row["kind"], row["set"], row["variant"]) for row in rows] == [
        ("gpu_counters", "resnet50", "fused_sam_triton")
    ]
    assert "resnet50 fp32 fused_sam: failed: ncu ended with 9: ==ERROR== no permission" in said
    assert "vit_b16 fp32 fused_sam: failed: ncu took more than" in said
    assert "vit_b16 fp32 fused_sam_triton: failed: Invalid output of ncu" in said


def test_the_table_shows_the_newest_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = made(monkeypatch, (0, output((NATIVE, NUMBERS))), (0, output(("perturb", NUMBERS), ("perturb", NUMBERS))))
    older = [
        row | {"date": "2026-01-01T00:00:00+00:00", "number": k, "kernel": "gone"} for row in rows for k in range(3)
    ]
    shown = gpu_tables.counters_all(tables.latest(older + rows))
    assert "gone" not in shown
    assert "| ResNet-50 | fp32 | FusedSAM | norm_kernel | 264 x 256 | 31.2 | 102.2 | 0.0 | 88.5 | 12.2 |  |" in shown
    assert shown.count("| perturb |") == 2
    assert shown.endswith("</sub>")
    assert gpu_tables.counters_all([]) == gpu_tables.NOTHING_YET
