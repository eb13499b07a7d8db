"""How a step scales to many ranks, on paper, from measured times and the rate of links: python -m bench.ranks.scaling

A step of one rank, measured without communication, takes T; one of its backwards T_b, its update T_u. The N gradients
of b bytes are sent in K buckets. A collective of S bytes among R ranks, G of them in a machine, M = R / G, takes

    A(S, R) = 2 (G - 1) / G S / B_in + 2 (M - 1) / M (S / G) / B_out + 2 K t ceil(log2 R)

where B_in and B_out are the rates of a rank's links inside a machine and between machines, t is the time of one
message, and every rank of a machine sends the G-th part of what leaves it. During backward all buckets but the last
can leave, so that a step waits for

    E = max(A / K, A - (1 - 1 / K) T_b)

of an all-reduce A. Rows of kind "overlap" (bench/ranks/overlap.py) and "gpu_iteration" (bench/gpu/iteration.py) are the
measured times; the former also say how far the formula is from what was measured with few ranks.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from bench import records
from bench.ranks.overlap import LATE, SILENT
from bench.records import Row
from bench.speed.rivals import OURS
from bench.speed.shapes import GPU_SETS, parameter_count
from bench.tables import latest, table

RANKS = (8, 64, 256, 1024)
BYTES = 4  # of a gradient
BUCKET_BYTES = 25 * 2**20
# Of an H100: NVLink 4 and one port of NDR InfiniBand, each way, as their makers state them; not measured.
PER_MACHINE, INSIDE, BETWEEN, MESSAGE = 8, 450e9, 50e9, 5e-6


@dataclass(frozen=True)
class Job:
    """A step of one rank without communication: its seconds, those of one backward and of the update."""

    name: str
    seconds: float
    backward: float
    update: float
    parameters: int
    bucket_bytes: float

    @property
    def nbytes(self) -> int:
        """Return the bytes of all gradients."""
        return self.parameters * BYTES

    @property
    def buckets(self) -> int:
        """Return in how many parts they are sent."""
        return max(1, math.ceil(self.nbytes / self.bucket_bytes))


@dataclass(frozen=True)
class Cluster:
    """Ranks of a machine, bytes a second of a rank's links inside it and between machines, seconds of a message."""

    per_machine: int
    inside: float
    between: float
    message: float

    def all_reduce(self, job: Job, ranks: int) -> float:
        """Return the seconds of the averaging of all gradients of a pass."""
        inside = min(ranks, self.per_machine)
        machines = math.ceil(ranks / inside)
        sent = 2 * (inside - 1) / inside * job.nbytes / self.inside
        sent += 2 * (machines - 1) / machines * job.nbytes / inside / self.between
        return sent + 2 * job.buckets * self.message * math.ceil(math.log2(ranks))


def exposed(job: Job, communication: float, hidden_by: float) -> float:
    """Return the seconds of it that a backward of so many seconds does not hide."""
    return max(communication / job.buckets, communication - (1 - 1 / job.buckets) * hidden_by)


def ours(job: Job, cluster: Cluster, ranks: int) -> float:
    """Return seconds where each rank has its own e: the second gradients are averaged."""
    return job.seconds + exposed(job, cluster.all_reduce(job, ranks), job.backward)


def both(job: Job, cluster: Cluster, ranks: int) -> float:
    """Return seconds where both gradients are averaged: an eager SAM in DistributedDataParallel, or "world"."""
    return job.seconds + 2 * exposed(job, cluster.all_reduce(job, ranks), job.backward)


def by_machine(job: Job, cluster: Cluster, ranks: int) -> float:
    """Return seconds where the ranks of a machine share a perturbation."""
    first = cluster.all_reduce(job, min(ranks, cluster.per_machine))
    return ours(job, cluster, ranks) + exposed(job, first, job.backward)


def sharded(job: Job, cluster: Cluster, ranks: int) -> float:
    """Return seconds where backward hides the reduce-scatter, nothing the gathering, and a rank updates its share."""
    half = cluster.all_reduce(job, ranks) / 2
    return job.seconds + exposed(job, half, job.backward) + half - job.update * (1 - 1 / ranks)


def late(job: Job, cluster: Cluster, ranks: int) -> float:
    """Return seconds where nothing is hidden."""
    return job.seconds + cluster.all_reduce(job, ranks)


Model = Callable[[Job, Cluster, int], float]
SHOWN: dict[str, Model] = {
    'FusedSAM "rank"': ours,
    "FusedSAM, one e a machine": by_machine,
    "FusedSAM, shard_state": sharded,
    "both gradients averaged": both,
}
# Variants of overlap.py that the formula covers. Of a reduce-scatter gloo makes an all-reduce: not sharded state.
MEASURED: dict[str, Model] = {"FusedSAM": ours, LATE: late, "DDP, FusedSAM": ours, "DDP, eager SAM": both}


def measured_jobs(rows: Sequence[Row]) -> list[tuple[Job, Cluster]]:
    """Return every job that has been timed, and the links it had; a GPU's are those stated above."""
    jobs = []
    for row in rows:
        if row["kind"] == "overlap" and row["variant"] == SILENT and "backward_s" in row:
            name = f"{row['model']}, CPU, {row['ranks']} ranks"
            times = row["median_s"], row["backward_s"], row["update_s"]
            job = Job(name, *times, row["parameters"], row["bucket_mb"] * 2**20)
            rate = row["megabits"] * 1e6 / 8
            message = row["smallest_s"] / (2 * math.ceil(math.log2(row["ranks"])))
            jobs.append((job, Cluster(1, rate, rate, message)))
        if row["kind"] == "gpu_iteration" and row["variant"] == OURS and not row["failed"]:
            name = f"{row['model']}, batches of {row['batch']}, {row['machine']['gpu']}"
            # Both are of two passes; of the optimizer's time the second has more than half.
            times = row["median_s"], row["backward_s"] / 2, row["optimizer_s"] / 2
            parameters = parameter_count(GPU_SETS[row["model"]]())
            jobs.append((Job(name, *times, parameters, BUCKET_BYTES), Cluster(PER_MACHINE, INSIDE, BETWEEN, MESSAGE)))
    return jobs


def projection(job: Job, cluster: Cluster, ranks: Sequence[int]) -> str:
    """Write a table of seconds without communication over those with it, by variant and number of ranks; its job."""
    lines = []
    for name, model in SHOWN.items():
        if model is not by_machine or cluster.per_machine > 1:
            lines.append([name, *(f"{job.seconds / model(job, cluster, n):.1%}" for n in ranks)])
    note = (
        f"A step takes {1e3 * job.seconds:.3g} ms, of which one backward {1e3 * job.backward:.3g} and the update "
        f"{1e3 * job.update:.2g} ({job.update / job.seconds:.1%}); {job.nbytes / 1e6:.3g} MB of gradients."
    )
    return f"{table([f'ranks: {job.name}', *map(str, ranks)], lines)}\n\n{note}"


def validation(rows: Sequence[Row]) -> str:
    """Write a table: what the formula says of the steps that were measured, beside them."""
    jobs = {(row["ranks"], row["megabits"]): made for row in rows for made in measured_jobs([row]) if "ranks" in row}
    lines = []
    for row in rows:
        if row["kind"] != "overlap" or row["variant"] not in MEASURED or (row["ranks"], row["megabits"]) not in jobs:
            continue
        job, cluster = jobs[row["ranks"], row["megabits"]]
        computed = MEASURED[row["variant"]](job, cluster, row["ranks"])
        seen = row["ratio_to_silent"]
        spread = f"{seen['median']:.2f} ({seen['p20']:.2f} to {seen['p80']:.2f})"
        lines.append(
            [f"{row['ranks']}", f"{row['megabits']:g}", row["variant"], f"{computed / job.seconds:.2f}", spread]
        )
    heads = ["ranks", "link, Mbit/s", "a step of", "formula: x no communication", "measured"]
    return table(heads, lines) if lines else ""


def block(rows: Sequence[Row]) -> str:
    """Write for docs/distributed.md how far the formula is from what was measured, then what it says of more ranks."""
    jobs = measured_jobs(rows)
    return "\n\n".join(filter(None, [validation(rows), *(projection(*job, RANKS) for job in jobs)]))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks.scaling", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=list(RANKS), help="default: " + " ".join(map(str, RANKS)))
    add("--per-machine", type=int, help="ranks in a machine")
    add("--inside", type=float, metavar="GB/S", help="a rank's link to those of its machine, each way")
    add("--between", type=float, metavar="GB/S", help="a rank's link to other machines, each way")
    add("--message", type=float, metavar="US", help="one message between two ranks")
    add("--results", type=Path, default=records.RESULTS, help="folder of .jsonl files")
    options = parser.parse_args(arguments)
    given = [options.per_machine, options.inside, options.between, options.message]
    if min(options.ranks) < 2 or any(x is not None and x <= 0 for x in given):
        parser.error("--ranks must be >= 2, all other numbers > 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every measured job, with its own links where none are given."""
    options = parse_arguments(arguments)
    jobs = measured_jobs(latest(records.read(options.results)))
    for job, own in jobs:
        cluster = Cluster(
            options.per_machine or own.per_machine,
            own.inside if options.inside is None else options.inside * 1e9,
            own.between if options.between is None else options.between * 1e9,
            own.message if options.message is None else options.message * 1e-6,
        )
        Console().print(Markdown(projection(job, cluster, options.ranks)))
    if not jobs:
        print("No measured job. Run python -m bench.ranks.overlap, or python -m bench.gpu.iteration on a GPU.")
    return 0 if jobs else 1


if __name__ == "__main__":
    sys.exit(main())
