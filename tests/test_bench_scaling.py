"""The formula of bench/ranks/scaling.py against times worked out by hand, and against steps that were measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench import records
from bench.ranks import overlap, scaling
from bench.ranks.scaling import Cluster, Job

# 8 MB of gradients in four buckets; backward takes 0.3 s of the step's 1 s, the update 0.02 s.
JOB = Job("a job", 1.0, 0.3, 0.02, 2_000_000, 2e6)


@pytest.mark.parametrize(
    ("cluster", "ranks", "seconds"),
    [
        (Cluster(8, 40e6, 1.0, 0.0), 8, 2 * 7 / 8 * 8e6 / 40e6),  # nothing between machines
        (Cluster(4, 100e6, 5e6, 0.0), 32, 2 * 3 / 4 * 8e6 / 100e6 + 2 * 7 / 8 * (8e6 / 4) / 5e6),  # a share each
        (Cluster(1, math.inf, math.inf, 1e-3), 1000, 2 * 4 * 10 * 1e-3),  # messages of four buckets, in a tree
    ],
)
def test_the_time_of_an_all_reduce(cluster: Cluster, ranks: int, seconds: float) -> None:
    assert cluster.all_reduce(JOB, ranks) == pytest.approx(seconds)


def test_backward_hides_all_buckets_but_the_last() -> None:
    assert scaling.exposed(JOB, 0.2, 0.3) == pytest.approx(0.2 / 4)
    assert scaling.exposed(JOB, 0.7, 0.3) == pytest.approx(0.7 - 0.75 * 0.3)
    one = Job("one bucket", 1.0, 0.3, 0.0, 10, math.inf)
    assert scaling.exposed(one, 0.2, 0.3) == 0.2


def test_variants_differ_by_what_they_send() -> None:
    cluster = Cluster(2, 80e6, 20e6, 0.0)
    everywhere, inside = cluster.all_reduce(JOB, 8), cluster.all_reduce(JOB, 2)
    ours = scaling.ours(JOB, cluster, 8)
    assert ours == 1.0 + scaling.exposed(JOB, everywhere, 0.3)
    assert scaling.both(JOB, cluster, 8) - 1.0 == pytest.approx(2 * (ours - 1.0))
    assert scaling.by_machine(JOB, cluster, 8) - ours == pytest.approx(scaling.exposed(JOB, inside, 0.3))
    assert scaling.late(JOB, cluster, 8) == 1.0 + everywhere
    half = everywhere / 2
    assert scaling.sharded(JOB, cluster, 8) == pytest.approx(1 + scaling.exposed(JOB, half, 0.3) + half - 0.02 * 7 / 8)


def overlap_rows(**parts: float) -> list[records.Row]:
    options = overlap.parse_arguments(["--ranks", "4", "--megabits", "200"])
    seconds = {name: [1.5] for name in overlap.VARIANTS} | {overlap.SILENT: [1.0]}
    return overlap.rows(options, seconds, dict.fromkeys(seconds, 2.5e6), {"parameters": 1_000_000} | parts)


PARTS = {"backward_s": 0.3, "optimizer_s": 0.05, "update_s": 0.03, "smallest_s": 0.004}


def test_measured_rows_become_jobs() -> None:
    rows = overlap_rows(**PARTS)
    [(job, cluster)] = scaling.measured_jobs(rows)
    assert (job.seconds, job.backward, job.update, job.parameters, job.buckets) == (1.0, 0.3, 0.03, 1_000_000, 4)
    assert (cluster.per_machine, cluster.between) == (1, 25e6)
    assert cluster.message == 0.001  # four of them, there and back in a tree of four
    gpu: dict[str, Any] = {"kind": "gpu_iteration", "model": "resnet50", "batch": 64, "variant": "fused_sam"}
    gpu |= {"machine": {"gpu": "a GPU"}, "median_s": 0.2, "backward_s": 0.12, "optimizer_s": 0.002, "failed": None}
    others = [gpu | {"variant": "eager_sgd"}, gpu | {"failed": "out of memory"}]
    [(job, cluster)] = scaling.measured_jobs([*others, gpu])
    assert (job.seconds, job.backward, job.parameters) == (0.2, 0.06, 25_557_032)
    assert cluster.per_machine == 8


def test_the_block_says_what_was_measured_and_what_follows() -> None:
    block = scaling.block(overlap_rows(**PARTS))
    sent = 2 * 3 / 4 * 4e6 / 25e6 + 2 * 4 * 0.001 * 2
    assert f"| 4 | 200 | {overlap.LATE} | {1 + sent:.2f} | 1.50 (1.50 to 1.50) |" in block
    assert "| ranks: WRN-16-4, CPU, 4 ranks | 8 | 64 | 256 | 1024 |" in block
    assert "e a machine" not in block  # each has one rank
    assert scaling.block([]) == scaling.block(overlap_rows()) == ""
