"""Figure 1, left: the part of the error that SAM saves, in all settings that have rows.

The base optimizer has trained for twice the epochs, which is as many forward-backward passes. Runs are compared seed by
seed. Where the radius was chosen on images held out, only that one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.paper import figures, summary
from bench.paper.config import used
from bench.records import Row

BASES = {"sam": "sgd", "sam-adam": "adam"}
# What SAM and its rival may differ in.
FREE = ("optimizer", "options", "epochs", "seed")


class Setting(NamedTuple):
    """Holds a comparison: what was trained, and the error that SAM saves, in percent of its rival's."""

    name: str
    saved: summary.Interval


def settings(rows: Sequence[Row]) -> list[Setting]:
    """Return all comparisons that the rows allow, of two seeds at least, the largest saving last."""
    found = []
    plain = [row for row in rows if row["kind"] == "paper" and set(row["config"]["options"]) <= {"rho"}]
    for group in _by_task(plain):
        rivals = {_run(row): _error(row) for row in group if row["config"]["optimizer"] in BASES.values()}
        for _, runs in _of_sam(group):
            pairs = [(_error(row), rivals[_rival(row)]) for row in runs if _rival(row) in rivals]
            if len(pairs) > 1 and all(other > 0 for _, other in pairs):  # of no error there is no part to save
                saved = [100 * (1 - error / other) for error, other in pairs]
                found.append(Setting(_name(runs[0]), summary.interval(saved)))
    return sorted(found, key=lambda setting: setting.saved.mean)


def _by_task(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield rows that differ in nothing but what is compared."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = {name: value for name, value in used(row["config"]).items() if name not in FREE}
        groups.setdefault(f"{row['experiment']} {sorted(same.items(), key=str)}", []).append(row)
    yield from groups.values()


def _of_sam(rows: Sequence[Row]) -> Iterator[tuple[tuple[object, ...], list[Row]]]:
    """Yield the runs of SAM by optimizer, length and radius; only of the chosen radius, where there was a choice."""
    sam = [row for row in rows if row["config"]["optimizer"] in BASES]
    for key, same in summary.by(sam, "optimizer", "epochs").items():
        radii = summary.by_option(same, "rho")
        for rho in [summary.chosen(radii)] if same[0]["config"]["validation"] else radii:
            yield (*key, rho), radii[rho]


def _run(row: Row) -> tuple[str, int, int]:
    config = row["config"]
    return config["optimizer"], config["epochs"], config["seed"]


def _rival(row: Row) -> tuple[str, int, int]:
    """Return the run that took as many passes without SAM."""
    config = row["config"]
    return BASES[config["optimizer"]], 2 * config["epochs"], config["seed"]


def _error(row: Row) -> float:
    """Return the error on the test set."""
    return row.get("unseen_error", row["test_error"])


def _name(row: Row) -> str:
    config = row["config"]
    noise = summary.labels(config["noise_rate"])
    kind = f"{config['noise']} " if config["noise_rate"] and config["noise"] != "symmetric" else ""
    boot = ", bootstrapped" if config["bootstrap"] else ""
    base = ", Adam" if config["optimizer"] == "sam-adam" else ""
    size = f"{config['dataset']} {config['train_size']:,}, {config['model']}{base}"
    return (
        f"{row['experiment']}: {size}, {kind}{noise}{boot}, {config['epochs']} epochs, rho {config['options']['rho']:g}"
    )


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw a line for each setting; return whether there is any."""
    found = settings(rows)
    if not found:
        return False
    about = "SAM against its base optimizer for twice the epochs, by seed: mean and 95 % interval"
    about = f"{about}; blue: SAM is better, orange: worse, grey: cannot be told"
    height = 1.4 + 0.24 * len(found)
    with figures.canvas("Error that SAM saves", about, path, width=10.5, height=height) as (axes,):
        for place, setting in enumerate(found):
            mean, half, _ = setting.saved
            colour = figures.GREY if abs(mean) <= half else figures.SAM if mean > 0 else figures.SGD
            axes.errorbar(mean, place, xerr=half, color=colour, fmt="D", markersize=5, capsize=3)
        axes.axvline(0, color=figures.GREY, linewidth=1)
        axes.set_yticks(range(len(found)), [setting.name for setting in found], fontsize=8)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_xlabel("part of the error that SAM saves, %")
    return True
