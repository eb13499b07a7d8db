"""Result rows as Markdown: one function per named block of README.md and docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from bench.records import Row
from bench.speed.harness import FLOOR
from bench.speed.rivals import OPTIONS, OURS, SCALE, VARIANTS
from bench.speed.shapes import SETS, TITLES, parameter_count

WRONG = "†"
# The rivals of the short table: what most code copies, the best of torch, the best-known package.
SHORT = ("eager_sgd", "foreach_sgd_fused", "pytorch_optimizer")
DTYPE_ORDER = ("fp32", "bf16", "fp16")
Key = tuple[object, ...]
# What makes two rows of a kind the same measurement.
STEP_KEY = ("set", "dtype", "threads", "variant")
KEYS = {
    "distributed": ("variant",),
    "overlap": ("ranks", "megabits", "variant"),
    "paper": ("experiment", "key"),
    "train": ("job", "optimizer", "seed"),
    "gpu_step": ("set", "dtype", "mode", "variant"),
    "gpu_iteration": ("model", "batch", "variant"),
    "gpu_counters": ("set", "dtype", "variant", "number"),
}


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of every measured thing; `rows` is sorted by date."""
    newest: dict[Key, Row] = {}
    for row in rows:
        newest[(row["kind"], *(row.get(name) for name in KEYS.get(row["kind"], STEP_KEY)))] = row
    return list(newest.values())


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def caption(rows: Sequence[Row]) -> str:
    """Machine, versions, date and commit; where rows differ, all that occur."""

    def every(part: str, key: str) -> str:
        return "/".join(dict.fromkeys(str(row.get(part, {}).get(key)) for row in rows))

    part = "versions" if "versions" in rows[0] else "machine"
    words = [
        f"{every('machine', 'cpu')}, {every('machine', 'cores')} cores, {every('machine', 'isa')}",
        f"Python {every(part, 'python')}, torch {every(part, 'torch')}, gcc {every(part, 'gcc')}",
        f"commit {every(part, 'commit')}",
        "/".join(dict.fromkeys(row["date"][:10] for row in rows)),
    ]
    return f"<sub>{'; '.join(words)}</sub>"


def title(name: str) -> str:
    """A variant's name for readers."""
    known = VARIANTS | OPTIONS
    return "copy of as many bytes" if name == FLOOR else known[name].title if name in known else name


def times(spread: dict[str, float] | None) -> str:
    """A ratio with its spread."""
    return "" if spread is None else f"**{spread['median']:.2f}** ({spread['p20']:.2f} to {spread['p80']:.2f})"


def milliseconds(row: Row) -> str:
    """A time with its spread, in three digits."""
    return f"{1e3 * row['median_s']:.3g} ({1e3 * row['p20_s']:.3g} to {1e3 * row['p80_s']:.3g})"


def _sorted_steps(rows: Sequence[Row]) -> list[Row]:
    order = (*VARIANTS, FLOOR)
    known = [row for row in rows if row["kind"] == "step" and row["variant"] in order and row["set"] in SETS]
    return sorted(
        known,
        key=lambda row: (
            DTYPE_ORDER.index(row["dtype"]),
            list(SETS).index(row["set"]),
            row["threads"],
            order.index(row["variant"]),
        ),
    )


def step_short(rows: Sequence[Row]) -> str:
    """fp32, FusedSAM's rows only."""
    shown = [row for row in _sorted_steps(rows) if row["variant"] == OURS and row["dtype"] == "fp32"]
    if not shown:
        return ""
    rivals = [name for name in SHORT if any(name in row["ratio_to_rival"] for row in shown)]
    heads = ["fp32", "threads", "FusedSAM, ms", *(f"{title(name)} takes" for name in rivals), "of copy speed"]
    lines = []
    for row in shown:
        floor = row["ratio_to_floor"]
        ratios = [times(row["ratio_to_rival"].get(name)) for name in rivals]
        share = f"{floor['median']:.0%}" if floor else "in cache"
        lines.append([TITLES[row["set"]], str(row["threads"]), milliseconds(row), *ratios, share])
    note = "Times as long as FusedSAM in the same round: median (20th to 80th percentile)."
    return f"{table(heads, lines)}\n\n{note}\n{caption(shown)}"


def step_all(rows: Sequence[Row]) -> str:
    """Every row."""
    shown = _sorted_steps(rows)
    if not shown:
        return ""
    ratios = {
        (row["set"], row["dtype"], row["threads"], other): spread
        for row in shown
        for other, spread in row["ratio_to_rival"].items()
    }
    heads = ["set", "dtype", "threads", "variant", "ms", "x FusedSAM", "GB/s", "of copy speed", "page faults"]
    lines = []
    for row in shown:
        floor = row["ratio_to_floor"]
        lines.append(
            [
                TITLES[row["set"]],
                row["dtype"],
                str(row["threads"]),
                title(row["variant"]) + ("" if row["valid"] else f" {WRONG}"),
                milliseconds(row),
                times(ratios.get((row["set"], row["dtype"], row["threads"], row["variant"]))),
                f"{row['bytes'] / row['median_s'] / 1e9:.1f}",
                f"{floor['median']:.0%}" if floor else "",
                f"{row['minor_faults']:.0f}",
            ]
        )
    wrong = ", ".join(dict.fromkeys(title(row["variant"]) for row in shown if not row["valid"]))
    note = f"\n\n{WRONG} wrong result in this dtype with this torch: {wrong}." if wrong else ""
    return f"{table(heads, lines)}{note}\n\n{caption(shown)}"


def options(rows: Sequence[Row]) -> str:
    """FusedSAM's options, each beside the copy of its own bytes."""
    order = [OURS, *OPTIONS]
    shown = [row for row in rows if row["kind"] == "options" and row["variant"] in order]
    if not shown:
        return ""
    shown.sort(key=lambda row: order.index(row["variant"]))
    heads = ["ResNet-50, fp32, 1 thread", "bytes per parameter", "ms", "GB/s", "of copy speed"]
    lines = [
        [
            title(row["variant"]),
            f"{row['bytes'] / parameter_count(SETS[row['set']]()):.0f}",
            milliseconds(row),
            f"{row['bytes'] / row['median_s'] / 1e9:.1f}",
            f"{row['ratio_to_floor']['median']:.0%}",
        ]
        for row in shown
    ]
    return f"{table(heads, lines)}\n\n{caption(shown)}"


def host(rows: Sequence[Row]) -> str:
    """Microseconds of a step on tensors of one element."""
    shown = [row for row in rows if row["kind"] == "host" and row["variant"] in VARIANTS]
    if not shown:
        return ""
    shown.sort(key=lambda row: list(VARIANTS).index(row["variant"]))
    ratios = next((row["ratio_to_rival"] for row in shown if row["variant"] == OURS), {})
    lines = [
        [
            title(row["variant"]),
            f"{1e6 * row['median_s']:.0f} ({1e6 * row['p20_s']:.0f} to {1e6 * row['p80_s']:.0f})",
            times(ratios.get(row["variant"])),
        ]
        for row in shown
    ]
    return f"{table([shown[0]['set'] + ' element', 'µs', 'x FusedSAM'], lines)}\n\n{caption(shown)}"


def memory(rows: Sequence[Row]) -> str:
    """Megabytes beyond those of plain SGD."""
    shown = [row for row in rows if row["kind"] == "memory" and row["variant"] in VARIANTS]
    if not shown:
        return ""
    shown.sort(key=lambda row: list(VARIANTS).index(row["variant"]))
    size = shown[0]["parameter_bytes"] / 1e6
    heads = [
        f"{size:.1f} MB of parameters",
        "peak of a step over SGD's, MB",
        "between steps beyond momentum, MB",
    ]
    lines = [
        [
            title(row["variant"]),
            _megabytes(row["peak_over_sgd_bytes"]),
            _megabytes(row["persistent_extra_bytes"]),
        ]
        for row in shown
        if row["variant"] != SCALE
    ]
    return f"{table(heads, lines)}\n\n{caption(shown)}"


def _megabytes(value: int) -> str:
    """Without the sign of a rounded-off zero."""
    return f"{round(value / 1e6, 1) + 0.0:.1f}"


def train(rows: Sequence[Row]) -> str:
    """Test error by job and optimizer, over the seeds."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "train":
            runs.setdefault((row["job"], row["label"]), []).append(row)
    if not runs:
        return ""
    heads = ["task", "optimizer", "epochs", "seeds", "test error, %", "step, ms", "optimizer's share"]
    lines = []
    for (_, label), group in sorted(runs.items()):
        one = group[0]
        noise = f", {one['label_noise']:.0%} label noise" if one["label_noise"] else ""
        share = statistics.fmean(row["optimizer_ms"] / row["step_ms"] for row in group)
        lines.append(
            [
                f"{one['dataset']}, {one['train_size']} images{noise}",
                label,
                str(one["run_epochs"]),
                str(len(group)),
                _mean([row["test_error_final"] for row in group]),
                f"{statistics.fmean(row['step_ms'] for row in group):.1f}",
                f"{share:.1%}",
            ]
        )
    shown = [row for group in runs.values() for row in group]
    return f"{table(heads, lines)}\n\n{caption(shown)}"


def distributed(rows: Sequence[Row]) -> str:
    """What a rank takes part in during one step: calls and elements, in units of the number of parameters."""
    counted = [row for row in rows if row["kind"] == "distributed"]
    if not counted:
        return ""
    lines = []
    for row in counted:
        names = "all_reduce", "all_gather", "broadcast"
        sums, parts, copies = (row["collectives"].get(name, [0, 0]) for name in names)
        per_parameter = [f"{n / row['parameters']:.2f}" for n in (sums[1], parts[1] * row["ranks"])]
        lines.append([row["variant"], str(sums[0]), per_parameter[0], str(parts[0]), per_parameter[1], str(copies[0])])
    heads = ["a step of", "all-reduces", "elements per parameter", "all-gathers", "elements per parameter"]
    return "\n\n".join(
        [
            table([*heads, "broadcasts of buffers"], lines),
            f"{counted[0]['ranks']} ranks, {counted[0]['parameters']} parameters. {caption(counted)}",
        ]
    )


def overlap(rows: Sequence[Row]) -> str:
    """Steps of ranks over limited links, against those without communication and with none of it hidden."""
    shown = [row for row in rows if row["kind"] == "overlap"]
    if not shown:
        return ""
    heads = ["ranks", "link, Mbit/s", "a step of", "ms", "x no communication", "x after backward", "MB sent by a rank"]
    lines = [
        [
            str(row["ranks"]),
            f"{row['megabits']:g}",
            row["variant"],
            milliseconds(row),
            times(row["ratio_to_silent"]),
            times(row["ratio_to_late"]),
            f"{row['sent_bytes'] / 1e6:.1f}",
        ]
        for row in sorted(shown, key=lambda row: (row["ranks"], row["megabits"]))
    ]
    one = shown[0]
    subject = f"{one['model']}, {one['parameters']} parameters, batches of {one['batch']}, one thread a rank"
    note = (
        f"{subject}, buckets of {one['bucket_mb']:g} MiB. Median of {one['rounds']} rounds (20th to 80th percentile)."
    )
    return f"{table(heads, lines)}\n\n{note} {caption(shown)}"


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "bench:cpu": step_short,
    "bench:cpu-all": step_all,
    "bench:options": options,
    "bench:host": host,
    "bench:memory": memory,
    "bench:distributed": distributed,
    "bench:overlap": overlap,
    "train": train,
}
