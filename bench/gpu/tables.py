"""Result rows from a GPU as Markdown, and as the summary that `make gpu` prints last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.gpu.counters import KIND as COUNTERS
from bench.gpu.counters import METRICS, scaled
from bench.gpu.iteration import KIND as ITERATION
from bench.gpu.iteration import STAGES, TWICE
from bench.gpu.rivals import EAGER, GRAPH, MODES, OURS, SCALE, SHORT, TITLES
from bench.gpu.step import KIND as STEP
from bench.records import Row
from bench.speed.harness import FLOOR
from bench.speed.plot import digits
from bench.speed.shapes import GPU_SETS
from bench.speed.shapes import TITLES as SET_TITLES
from bench.tables import DTYPE_ORDER, WRONG, columns, every, in_order, latest, small, table, times

NOTHING_YET = "No row from a GPU has been recorded yet."
STEP_PICTURE, ITERATION_PICTURE = "step_gpu.png", "iteration_gpu.png"
VARIANT_ORDER = (*OURS.values(), *(name for name in TITLES if name not in OURS.values()), FLOOR)
ITERATION_TITLES = TITLES | {SCALE: "SGD(fused), one pass", TWICE: "SGD(fused), two passes"}


def caption(rows: Sequence[Row]) -> str:
    """Write GPU, versions, commit and date; where rows differ, all that occur."""
    gpu, sms, driver = (every(rows, "machine", key) for key in ("gpu", "sms", "driver"))
    names = {"Python": "python", "torch": "torch", "CUDA": "cuda", "triton": "triton"}
    versions = ", ".join(f"{name} {every(rows, 'versions', key)}" for name, key in names.items())
    return small(rows, f"{gpu}, {sms} SMs, driver {driver}", versions)


def title(name: str) -> str:
    """Return a variant's name for readers."""
    return "copy of as many bytes" if name == FLOOR else TITLES[name]


def microseconds(seconds: float) -> str:
    """Write seconds in that unit."""
    return digits(1e6 * seconds)


def milliseconds(row: Row) -> str:
    """Write a time with its spread."""
    return "{} ({} to {})".format(*(digits(1e3 * row[key]) for key in ("median_s", "p20_s", "p80_s")))


def step_rows(rows: Iterable[Row]) -> list[Row]:
    """Return those of the optimizer side that belong to known things, in reading order."""
    return in_order(rows, STEP, dtype=DTYPE_ORDER, set=GPU_SETS, mode=MODES, variant=VARIANT_ORDER)


def iteration_rows(rows: Iterable[Row]) -> list[Row]:
    """Return those of whole iterations, in reading order."""
    return in_order(rows, ITERATION, model=None, batch=None, variant=(*VARIANT_ORDER, TWICE))


def ours(rows: Sequence[Row]) -> Row | None:
    """Return FusedSAM's row on the best backend that worked."""
    worked = {row["variant"]: row for row in rows if not row["failed"]}
    return next((worked[name] for name in OURS.values() if name in worked), None)


def _short_steps(rows: Sequence[Row]) -> str:
    heads = ["set", "FusedSAM, µs", "host, µs", "launches", *(f"{title(name)} takes" for name in SHORT[EAGER])]
    heads += ["in a CUDA graph, µs", *(f"{title(name)} takes" for name in SHORT[GRAPH]), "of copy speed"]
    lines = []
    for dtype, set_name in dict.fromkeys((row["dtype"], row["set"]) for row in rows):
        both = {}
        for mode in MODES:
            where = (dtype, set_name, mode)
            both[mode] = ours([row for row in rows if (row["dtype"], row["set"], row["mode"]) == where])
        lines.append([f"{SET_TITLES[set_name]} {dtype}", *_eager_cells(both[EAGER]), *_graph_cells(both[GRAPH])])
    return table(heads, lines)


def _eager_cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * (3 + len(SHORT[EAGER]))
    note = "" if row["variant"] == OURS["native"] else f" {title(row['variant'])}"
    launches = "" if row["launches"] is None else str(row["launches"])
    ratios = [times(row["ratio_to_rival"].get(name)) for name in SHORT[EAGER]]
    return [microseconds(row["median_s"]) + note, microseconds(row["host_s"]), launches, *ratios]


def _graph_cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * (2 + len(SHORT[GRAPH]))
    ratios = [times(row["ratio_to_rival"].get(name)) for name in SHORT[GRAPH]]
    return [microseconds(row["median_s"]), *ratios, _share(row)]


def _share(row: Row) -> str:
    floor = row["ratio_to_floor"]
    return f"{floor['median']:.0%}" if floor else ""


def _short_iterations(rows: Sequence[Row]) -> str:
    best = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        best.append(ours([one for one in rows if (one["model"], one["batch"]) == (model, batch)]))
    cells = {
        "forward, backward, SAM": lambda row: f"{SET_TITLES[row['model']]}, batch {row['batch']}",
        "FusedSAM, ms": milliseconds,
        "of SGD twice": lambda row: times(row["ratios"].get(TWICE)),
        "of SGD": lambda row: times(row["ratios"].get(SCALE)),
        "eager SAM takes": _eager_takes,
        "peak over SGD, MB": _peak,
    }
    return columns(filter(None, best), cells)


def _eager_takes(row: Row) -> str:
    eager = row["ratios"].get("eager_sgd")
    return f"**{1 / eager['median']:.2f}**" if eager else ""


def _peak(row: Row) -> str:
    over = row["peak_over_sgd_bytes"]
    return "" if over is None else f"{over / 1e6:.0f}"


def short(rows: Sequence[Row]) -> str:
    """Write FusedSAM's rows of both benchmarks."""
    steps, iterations = step_rows(rows), iteration_rows(rows)
    parts = [_short_steps(steps)] if ours(steps) else []
    parts += [_short_iterations(iterations)] if ours(iterations) else []
    if not parts:
        return NOTHING_YET
    note = "Times as long as FusedSAM in the same round: median (20th to 80th percentile)."
    return "\n\n".join([*parts, f"{note}\n{caption([*steps, *iterations])}"])


def step_all(rows: Sequence[Row]) -> str:
    """Write every row of the optimizer side."""
    shown = step_rows(rows)
    if not shown:
        return NOTHING_YET
    heads = ["set", "dtype", "mode", "variant", "µs", "x FusedSAM", "host, µs", "launches", "copies and fills", "waits"]
    heads += ["GB/s", "of copy speed"]
    lines = []
    for row in shown:
        same = [one for one in shown if all(one[key] == row[key] for key in ("set", "dtype", "mode"))]
        lines.append([SET_TITLES[row["set"]], row["dtype"], row["mode"], *_step_cells(row, ours(same))])
    picture = f"![Optimizer side of a step]({STEP_PICTURE})"
    return f"{picture}\n\n{table(heads, lines)}\n\n{WRONG} wrong result.\n\n{caption(shown)}"


def _step_cells(row: Row, best: Row | None) -> list[str]:
    if row["failed"]:
        return [title(row["variant"]), row["failed"].replace("|", "/"), *[""] * 7]
    ratio = best["ratio_to_rival"].get(row["variant"]) if best else None
    counts = [row["launches"], row["memory_operations"], row["syncs"]]
    spread = " to ".join(microseconds(row[key]) for key in ("p20_s", "p80_s"))
    return [
        title(row["variant"]) + ("" if row["valid"] else f" {WRONG}"),
        f"{microseconds(row['median_s'])} ({spread})",
        times(ratio),
        microseconds(row["host_s"]),
        *("" if count is None else str(count) for count in counts),
        f"{row['bytes'] / row['median_s'] / 1e9:.0f}" if row["bytes"] else "",
        _share(row),
    ]


def iteration_all(rows: Sequence[Row]) -> str:
    """Write every row of whole iterations."""
    shown = iteration_rows(rows)
    if not shown:
        return NOTHING_YET
    heads = ["model", "batch", "variant", "ms", *STAGES, "of SGD twice", "peak over SGD, MB"]
    lines = []
    for row in shown:
        start = [SET_TITLES[row["model"]], str(row["batch"]), ITERATION_TITLES[row["variant"]]]
        if row["failed"]:
            lines.append([*start, row["failed"].replace("|", "/"), *[""] * 5])
            continue
        stages = [f"{1e3 * row[f'{stage}_s']:.2f}" for stage in STAGES]
        lines.append([*start, milliseconds(row), *stages, times(row["ratios"].get(TWICE)), _peak(row)])
    picture = f"![Stages of an iteration]({ITERATION_PICTURE})"
    return f"{picture}\n\n{table(heads, lines)}\n\n{caption(shown)}"


def counters_all(rows: Sequence[Row]) -> str:
    """Write every kernel of the newest step that was looked at of each set, dtype and variant."""
    shown = counter_rows(rows)
    if not shown:
        return NOTHING_YET
    heads = ("µs", "read, MB", "written, MB", "memory busy, %", "L2 hits, %", "occupancy, %")
    cells = {
        "set": lambda row: SET_TITLES[row["set"]],
        "dtype": lambda row: row["dtype"],
        "variant": lambda row: title(row["variant"]),
        "kernel": lambda row: row["kernel"],
        "blocks x threads": lambda row: " x ".join(row[k].strip("() ").partition(",")[0] for k in ("grid", "block")),
        **{head: lambda row, n=name: scaled(row, n) for head, name in zip(heads, METRICS, strict=True)},
    }
    return f"{columns(shown, cells)}\n\n{caption(shown)}"


def counter_rows(rows: Iterable[Row]) -> list[Row]:
    """Return those of counters, of the newest step alone, which may have had fewer kernels than others."""
    known = in_order(rows, COUNTERS, dtype=DTYPE_ORDER, set=GPU_SETS, variant=VARIANT_ORDER, number=None)
    newest: dict[tuple[str, ...], str] = {}
    for row in known:
        step = row["set"], row["dtype"], row["variant"]
        newest[step] = max(newest.get(step, ""), row["date"])
    return [row for row in known if row["date"] == newest[row["set"], row["dtype"], row["variant"]]]


def summary(rows: Sequence[Row]) -> str:
    """Write the short tables of a run, oldest rows first in `rows`."""
    return short(latest(rows))


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "bench:gpu": short,
    "bench:gpu-step": step_all,
    "bench:gpu-iteration": iteration_all,
    "bench:gpu-counters": counters_all,
}
