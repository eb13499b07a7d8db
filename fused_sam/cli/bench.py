"""Time of the optimizer side of a step against other implementations.

A short run of python -m bench.step on the parameter shapes of a model, in fp32. The benchmarks belong to a source
checkout of FusedSAM: run this in its folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fused_sam.cli import arguments, output
from fused_sam.cli.target import search_current_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a short run can choose."""
    parser.add_argument(
        "--set", choices=["resnet20", "resnet50", "wrn28_10", "vit_b16"], default="resnet20", help="default: resnet20"
    )
    parser.add_argument("--rounds", type=arguments.whole(1), default=5, help="default: 5")
    parser.add_argument("--threads", type=arguments.whole(1), default=1, help="default: 1")
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run it, or say where it is."""
    checkout = find_checkout()
    if checkout is None:
        print("The benchmarks are in the folder bench of a source checkout of FusedSAM: run this there.")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "bench.step", "--sets", options.set, "--dtypes", "fp32"]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds), "--out", str(rows_file)]
        status = subprocess.run(command, cwd=checkout, stdout=sys.stderr).returncode
        if status:
            return status
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    print(output.table(["optimizer side of a step", "ms", "x FusedSAM"], _compare(rows)))
    if options.json:
        output.write_json(options.json, options, rows)
    return 0


def find_checkout() -> Path | None:
    """The folder that has the package bench with our benchmarks."""
    search_current_folder()
    try:
        spec = importlib.util.find_spec("bench.step")
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent.parent


def _compare(rows: list[dict[str, Any]]) -> list[list[Any]]:
    ratios = {name: r["median"] for row in rows for name, r in row["ratio_to_rival"].items()}
    return [[row["variant"], 1e3 * row["median_s"], ratios.get(row["variant"], "-")] for row in rows]
