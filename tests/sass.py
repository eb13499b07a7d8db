"""Reading compiled GPU code: how many loads of 16 bytes a loop has under way before the first is waited for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
WAITS_FOR_ALL = ("EXIT", "BAR", "MEMBAR", "RET", "CALL")


def cuobjdump() -> str | None:
    """Find the tool on the path, in the toolkit, or in triton's wheel, which brings nvdisasm too."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += [str(Path(site, "triton", "backends", "nvidia", "bin")) for site in sys.path]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def dump(library: Path, *options: str) -> str:
    """Return what cuobjdump prints of a library."""
    tool = cuobjdump()
    assert tool is not None
    beside = {**os.environ, "PATH": os.path.dirname(tool) + os.pathsep + os.environ["PATH"]}  # it calls nvdisasm
    return subprocess.run([tool, *options, library], capture_output=True, text=True, check=True, env=beside).stdout


def loops_of(library: Path, architecture: str, kernels: list[str]) -> dict[str, list[int]]:
    """Return, for kernels by their mangled names, the loads under way in each innermost loop that has such loads."""
    text = dump(library, "-sass", "-arch", f"sm_{architecture}", "-fun", ",".join(kernels))
    found = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        name, *lines = function.splitlines()
        found[name.strip()] = [loads_under_way(loop) for loop in _innermost_loops(lines) if _loads(loop)]
    return found


def loads_under_way(instructions: list[re.Match[str]]) -> int:
    """Return the most loads that are issued before an instruction waits for one of them.

    One that reads or overwrites a register which a load is still to fill waits for it, and so for the older ones.
    """
    most = 0
    pending: list[set[int]] = []
    for match in instructions:
        _, predicate, name, operands = match.groups()
        if name.startswith(WAITS_FOR_ALL) or (name == "BRA" and not predicate):
            pending.clear()
            continue
        target, _, address = operands.partition(",")
        if is_load := _is_load(match):
            touched = _registers(address, 2) | _registers(target, 4)
        else:
            wide = ".64" in name or name.startswith(("D", "F2F.F64"))
            touched = _registers(operands, 4 if ".128" in name else 2 if wide else 1)
        waited = [k for k, registers in enumerate(pending) if registers & touched]
        del pending[: max(waited, default=-1) + 1]
        if is_load:
            pending.append(_registers(target, 4))
            most = max(most, len(pending))
    return most


def _innermost_loops(lines: list[str]) -> list[list[re.Match[str]]]:
    """Return the instructions from the target of each backward branch to the branch, for loops that hold no other."""
    code = [match for match in map(INSTRUCTION.search, lines) if match]
    at = {int(match[1], 16): i for i, match in enumerate(code)}
    spans = []
    for i, match in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", match[4]) if match[3] == "BRA" else None
        if target and at.get(int(target[1], 16), i) < i:
            spans.append((at[int(target[1], 16)], i))
    return [code[a : b + 1] for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]


def _is_load(match: re.Match[str]) -> bool:
    return match[3].startswith("LDG") and ".128" in match[3]


def _loads(loop: list[re.Match[str]]) -> bool:
    return any(map(_is_load, loop))


def _registers(operands: str, width: int) -> set[int]:
    return {int(first) + k for first in re.findall(r"\bR(\d+)\b", operands) for k in range(width)}
