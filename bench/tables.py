"""Result rows as Markdown: one function per named block of README.md and the pages of docs/."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.records import Row, interval
from bench.speed.harness import FLOOR
from bench.speed.rivals import OPTIONS, OURS, SCALE, TWICE, VARIANTS
from bench.speed.shapes import HOST_SETS, SETS, TITLES, host_set, parameter_count

WRONG = "†"
# The rivals of the short table: what most code copies, the best of torch, the best-known package.
SHORT = ("eager_sgd", "foreach_sgd_fused", "pytorch_optimizer")
# Beside FusedSAM's host time: what most code copies, the best of torch, and two steps without SAM.
HOST_RIVALS = ("eager_sgd", "foreach_sgd_fused", TWICE)
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
    """Return the newest row of every measured thing; `rows` is sorted by date."""
    newest: dict[Key, Row] = {}
    for row in rows:
        newest[(row["kind"], *(row.get(name) for name in KEYS.get(row["kind"], STEP_KEY)))] = row
    return list(newest.values())


def in_order(rows: Iterable[Row], kind: str, **orders: Iterable[object] | None) -> list[Row]:
    """Return the rows of a kind whose values are among these, in their order; None: all values, sorted."""
    known = {name: list(order) for name, order in orders.items() if order is not None}
    shown = [row for row in rows if row["kind"] == kind and all(row[name] in known[name] for name in known)]

    def place(row: Row) -> list[object]:
        return [known[name].index(row[name]) if name in known else row[name] for name in orders]

    return sorted(shown, key=place)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def columns(rows: Iterable[Row], cells: Mapping[str, Callable[[Row], str]]) -> str:
    """Write a table with a line for each row; `cells` has a column's heading, and what it shows of a row."""
    return table(list(cells), [[cell(row) for cell in cells.values()] for row in rows])


def every(rows: Sequence[Row], part: str, key: str) -> str:
    """Return all values that occur in the rows."""
    return "/".join(dict.fromkeys(str(row.get(part, {}).get(key)) for row in rows))


def small(rows: Sequence[Row], *words: str) -> str:
    """Write words about the rows with their commit and date in small print."""
    part = "versions" if "versions" in rows[0] else "machine"
    dates = "/".join(dict.fromkeys(row["date"][:10] for row in rows))
    commits = f"commit {every(rows, part, 'commit')}"
    return f"<sub>{'; '.join([*words, commits, dates])}</sub>"


def caption(rows: Sequence[Row]) -> str:
    """Write machine, versions, date and commit; where rows differ, all that occur."""
    part = "versions" if "versions" in rows[0] else "machine"
    cpu, cores, isa = (every(rows, "machine", key) for key in ("cpu", "cores", "isa"))
    python, torch, gcc = (every(rows, part, key) for key in ("python", "torch", "gcc"))
    return small(rows, f"{cpu}, {cores} cores, {isa}", f"Python {python}, torch {torch}, gcc {gcc}")


def title(name: str) -> str:
    """Return a variant's name for readers."""
    known = VARIANTS | OPTIONS
    return "copy of as many bytes" if name == FLOOR else known[name].title if name in known else name


def times(spread: dict[str, float] | None) -> str:
    """Write a ratio with its spread."""
    return "" if spread is None else f"**{spread['median']:.2f}** ({spread['p20']:.2f} to {spread['p80']:.2f})"


def milliseconds(row: Row) -> str:
    """Write a time with its spread, in three digits."""
    return f"{1e3 * row['median_s']:.3g} ({1e3 * row['p20_s']:.3g} to {1e3 * row['p80_s']:.3g})"


def variant(row: Row) -> str:
    """Write a variant's name, with a mark where its result is wrong."""
    return title(row["variant"]) + ("" if row.get("valid", True) else f" {WRONG}")


def _rate(row: Row) -> str:
    return f"{row['bytes'] / row['median_s'] / 1e9:.1f}"


def _share(row: Row) -> str:
    floor = row["ratio_to_floor"]
    return f"{floor['median']:.0%}" if floor else ""


def _steps(rows: Sequence[Row]) -> list[Row]:
    return in_order(rows, "step", dtype=DTYPE_ORDER, set=SETS, threads=None, variant=(*VARIANTS, FLOOR))


def step_short(rows: Sequence[Row]) -> str:
    """Write the rows of FusedSAM in fp32."""
    shown = [row for row in _steps(rows) if row["variant"] == OURS and row["dtype"] == "fp32"]
    if not shown:
        return ""
    rivals = [name for name in SHORT if any(name in row["ratio_to_rival"] for row in shown)]
    text = columns(
        shown,
        {
            "fp32": lambda row: TITLES[row["set"]],
            "threads": lambda row: str(row["threads"]),
            "FusedSAM, ms": milliseconds,
            **{f"{title(name)} takes": lambda row, n=name: times(row["ratio_to_rival"].get(n)) for name in rivals},
            "of copy speed": lambda row: _share(row) or "in cache",
        },
    )
    note = "Times as long as FusedSAM in the same round: median (20th to 80th percentile)."
    return f"{text}\n\n{note}\n{caption(shown)}"


def step_all(rows: Sequence[Row]) -> str:
    """Write every row of the optimizer side."""
    shown = _steps(rows)
    if not shown:
        return ""
    place = ("set", "dtype", "threads")
    ratios = {tuple(row[k] for k in place): row["ratio_to_rival"] for row in shown if row["variant"] == OURS}
    text = columns(
        shown,
        {
            "set": lambda row: TITLES[row["set"]],
            "dtype": lambda row: row["dtype"],
            "threads": lambda row: str(row["threads"]),
            "variant": variant,
            "ms": milliseconds,
            "x FusedSAM": lambda row: times(ratios.get(tuple(row[k] for k in place), {}).get(row["variant"])),
            "GB/s": _rate,
            "of copy speed": _share,
            "page faults": lambda row: f"{row['minor_faults']:.0f}",
        },
    )
    wrong = ", ".join(dict.fromkeys(title(row["variant"]) for row in shown if not row["valid"]))
    note = f"\n\n{WRONG} wrong result in this dtype with this torch: {wrong}." if wrong else ""
    return f"{text}{note}\n\n{caption(shown)}"


def options(rows: Sequence[Row]) -> str:
    """Write FusedSAM's options, each beside the copy of its own bytes."""
    shown = in_order(rows, "options", variant=[OURS, *OPTIONS])
    if not shown:
        return ""
    cells = {
        "ResNet-50, fp32, 1 thread": variant,
        "bytes per parameter": lambda row: f"{row['bytes'] / parameter_count(SETS[row['set']]()):.0f}",
        "ms": milliseconds,
        "GB/s": _rate,
        "of copy speed": _share,
    }
    return f"{columns(shown, cells)}\n\n{caption(shown)}"


def host(rows: Sequence[Row]) -> str:
    """Write microseconds of a step on as many tensors of one element as ResNet-50 has."""
    shown = in_order(rows, "host", set=[host_set(HOST_SETS["resnet50"])], variant=VARIANTS)
    if not shown:
        return ""
    ratios = next((row["ratio_to_rival"] for row in shown if row["variant"] == OURS), {})
    cells = {
        f"{shown[0]['set']} element": variant,
        "µs": _microseconds,
        "first half": lambda row: _half(row, "first_s"),
        "second half": lambda row: _half(row, "second_s"),
        "x FusedSAM": lambda row: times(ratios.get(row["variant"])),
    }
    return f"{columns(shown, cells)}\n\n{caption(shown)}"


def host_sets(rows: Sequence[Row]) -> str:
    """Write FusedSAM's microseconds by number of tensors, with the times that rivals take."""
    sizes = {host_set(tensors): (name, tensors) for name, tensors in HOST_SETS.items()}
    shown = in_order(rows, "host", set=sizes, variant=[OURS])
    if not shown:
        return ""
    rivals = [name for name in HOST_RIVALS if any(name in row["ratio_to_rival"] for row in shown)]
    cells = {
        "tensors of one element": lambda row: _host_title(*sizes[row["set"]]),
        "FusedSAM, µs": _microseconds,
        "first half": lambda row: _half(row, "first_s"),
        "second half": lambda row: _half(row, "second_s"),
        "for a tensor": lambda row: f"{1e6 * row['median_s'] / sizes[row['set']][1]:.2f}",
        **{f"{title(name)} takes": lambda row, n=name: times(row["ratio_to_rival"].get(n)) for name in rivals},
    }
    return f"{columns(shown, cells)}\n\n{caption(shown)}"


def _host_title(name: str, tensors: int) -> str:
    return f"{tensors:,}, as {TITLES[name]}" if name in TITLES else f"{tensors:,}"


def _microseconds(row: Row) -> str:
    return "{:.0f} ({:.0f} to {:.0f})".format(*(1e6 * row[f"{name}_s"] for name in ("median", "p20", "p80")))


def _half(row: Row, name: str) -> str:
    """Write the microseconds of a half, which rows from before they were kept do not have."""
    return f"{1e6 * row[name]:.0f}" if name in row else ""


def instructions(rows: Sequence[Row]) -> str:
    """Write the instructions of a step on tensors of one element."""
    shown = in_order(rows, "instructions", set=None, variant=VARIANTS)
    if not shown:
        return ""
    totals = {row["set"]: row["step"]["total"] for row in shown if row["variant"] == OURS}

    def times_ours(row: Row) -> str:
        ours = totals.get(row["set"])
        return f"**{row['step']['total'] / ours:.2f}**" if ours and row["variant"] != OURS else ""

    cells = {
        "instructions, one thread": variant,
        "tensors": lambda row: f"{row['tensors']:,}",
        "of a step": lambda row: f"{row['step']['total']:,}",
        "first half": lambda row: f"{row['first']['total']:,}",
        "second half": lambda row: f"{row['second']['total']:,}",
        "x FusedSAM": times_ours,
        "whatever the number": lambda row: f"{row['step']['fixed']:,}",
        "for each tensor": lambda row: f"{row['step']['per_tensor']:,}",
        "of these its kernels": lambda row: f"{row['kernels']['per_tensor']:,}" if row["variant"] == OURS else "",
        "release of gradients": lambda row: f"{row['freeing']['per_tensor']:,}",
    }
    return f"{columns(shown, cells)}\n\n{small(shown, every(shown, 'machine', 'cpu'), *_programs(shown))}"


def _programs(rows: Sequence[Row]) -> list[str]:
    python, torch = (every(rows, "versions", key) for key in ("python", "torch"))
    return [f"Python {python}, torch {torch}, {'/'.join(dict.fromkeys(row['valgrind'] for row in rows))}"]


def memory(rows: Sequence[Row]) -> str:
    """Write megabytes beyond those of plain SGD."""
    shown = in_order(rows, "memory", variant=VARIANTS)
    if not shown:
        return ""
    cells = {
        f"{shown[0]['parameter_bytes'] / 1e6:.1f} MB of parameters": variant,
        "peak of a step over SGD's, MB": lambda row: _megabytes(row["peak_over_sgd_bytes"]),
        "between steps beyond momentum, MB": lambda row: _megabytes(row["persistent_extra_bytes"]),
    }
    return f"{columns([row for row in shown if row['variant'] != SCALE], cells)}\n\n{caption(shown)}"


def _megabytes(value: int) -> str:
    """Write megabytes without the sign of a rounded-off zero."""
    return f"{round(value / 1e6, 1) + 0.0:.1f}"


def train(rows: Sequence[Row]) -> str:
    """Write test errors by job and optimizer: at the end, and at the epoch that images held out choose."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "train":
            runs.setdefault((row["job"], row["label"]), []).append(row)
    if not runs:
        return ""
    lines = []
    for (_, label), group in sorted(runs.items()):
        one = group[0]
        noise = f", {one['label_noise']:.0%} label noise" if one["label_noise"] else ""
        step = statistics.fmean(row["step_ms"] for row in group)
        share = statistics.fmean(row["optimizer_ms"] / row["step_ms"] for row in group)
        errors = [str(interval([row[f"test_error_{when}"] for row in group])) for when in ("final", "best")]
        cells = [str(one["run_epochs"]), str(len(group)), *errors, "/".join(str(row["best_epoch"]) for row in group)]
        lines.append(
            [f"{one['dataset']}, {one['train_size']} images{noise}", label, *cells, f"{step:.1f}", f"{share:.1%}"]
        )
    errors = ["test error at the end, %", "at the best epoch, %", "best epochs, by images held out"]
    heads = ["task", "optimizer", "epochs", "seeds", *errors, "step, ms", "optimizer's share"]
    return f"{table(heads, lines)}\n\n{caption([row for group in runs.values() for row in group])}"


def distributed(rows: Sequence[Row]) -> str:
    """Write what a rank takes part in during one step: calls and elements, in units of the number of parameters."""
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
    about = f"{counted[0]['ranks']} ranks, {counted[0]['parameters']} parameters. {caption(counted)}"
    return f"{table([*heads, 'broadcasts of buffers'], lines)}\n\n{about}"


def overlap(rows: Sequence[Row]) -> str:
    """Write steps of ranks over limited links, against those without communication and with none of it hidden."""
    shown = [row for row in rows if row["kind"] == "overlap"]
    if not shown:
        return ""
    cells = {
        "ranks": lambda row: str(row["ranks"]),
        "link, Mbit/s": lambda row: f"{row['megabits']:g}",
        "a step of": lambda row: row["variant"],
        "ms": milliseconds,
        "x no communication": lambda row: times(row["ratio_to_silent"]),
        "x after backward": lambda row: times(row["ratio_to_late"]),
        "MB sent by a rank": lambda row: f"{row['sent_bytes'] / 1e6:.1f}",
    }
    text = columns(sorted(shown, key=lambda row: (row["ranks"], row["megabits"])), cells)
    one = shown[0]
    subject = f"{one['model']}, {one['parameters']} parameters, batches of {one['batch']}, one thread a rank"
    note = f"buckets of {one['bucket_mb']:g} MiB. Median of {one['rounds']} rounds (20th to 80th percentile)."
    return f"{text}\n\n{subject}, {note} {caption(shown)}"


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "bench:cpu": step_short,
    "bench:cpu-all": step_all,
    "bench:options": options,
    "bench:host": host,
    "bench:host-sets": host_sets,
    "bench:instructions": instructions,
    "bench:memory": memory,
    "bench:distributed": distributed,
    "bench:overlap": overlap,
    "train": train,
}
