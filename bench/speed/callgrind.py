"""Count instructions of chosen parts of a program under valgrind's callgrind.

The program is run with instrumentation off, and asks valgrind by a library of three functions, made when it is
needed, to count: they are instructions that do nothing where valgrind does not run.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

SOURCE = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_STOP_INSTRUMENTATION; }
void dump(const char *label) { CALLGRIND_DUMP_STATS_AT(label); }
"""
OUTPUT = "callgrind.out"
LABEL = "desc: Trigger: Client Request: "
NAME = re.compile(r"(c?fn)=(\(\d+\))(?: (.*))?")


class CallgrindError(RuntimeError):
    """Says in one line why nothing could be counted."""


class Control(Protocol):
    """What the counted program asks valgrind for."""

    def start(self) -> None:
        """Count from here on."""

    def stop(self) -> None:
        """Count no more."""

    def dump(self, label: str) -> None:
        """Write what was counted since the last call, and begin at zero."""


class Library:
    """The requests to valgrind, from the library that `build` made."""

    def __init__(self, path: str) -> None:
        # PyDLL: giving up and taking back the interpreter lock would be counted.
        self._functions = ctypes.PyDLL(path)
        self.start, self.stop = self._functions.start, self._functions.stop

    def dump(self, label: str) -> None:
        """Write what was counted since the last call, and begin at zero."""
        self._functions.dump(label.encode())


def build(folder: Path) -> Path:
    """Return the library of the requests, compiled into a folder.

    Raises:
        CallgrindError: where a tool is missing.
    """
    for tool, use in (("valgrind", "counts the instructions"), ("gcc", "compiles the switch that turns counting on")):
        if shutil.which(tool) is None:
            raise CallgrindError(f"{tool} was not found, which {use}: install it and try again.")
    source, library = folder / "requests.c", folder / "requests.so"
    source.write_text(SOURCE, encoding="ascii")
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise CallgrindError(f"gcc could not compile against valgrind's headers: {line}")
    return library


def version() -> str:
    """Return that of valgrind."""
    return subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def run(command: Sequence[str], folder: Path) -> dict[str, Profile]:
    """Run a command under callgrind, instrumentation off; return what it counted, by label, the sum of equal ones.

    Raises:
        CallgrindError: where it fails.
    """
    folder.mkdir()
    callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / OUTPUT}"]
    # The seed: where a dictionary has its entries decides how many instructions find one.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run([*callgrind, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("==")]
        last = said[-1] if said else "no message"
        raise CallgrindError(f"{' '.join(command)} failed under valgrind, exit status {done.returncode}: {last}")
    found: dict[str, Profile] = {}
    for path in sorted(folder.iterdir()):
        profile = read(path)
        if profile.label:
            before = found.get(profile.label, Profile(profile.label, 0, []))
            found[profile.label] = Profile(profile.label, before.total + profile.total, before.calls + profile.calls)
    return found


class Call(NamedTuple):
    """Holds the calls of one function by another, and the instructions in them and in whatever they call."""

    caller: str
    callee: str
    instructions: int


class Profile(NamedTuple):
    """Holds what was counted up to one dump; `label` is empty where the program did not ask for the dump."""

    label: str
    total: int
    calls: list[Call]

    def inside(self, name: re.Pattern[str]) -> int:
        """Return the instructions in functions whose names begin so and in what they call, none counted twice."""
        return sum(call.instructions for call in self.calls if name.match(call.callee) and not name.match(call.caller))


def read(path: Path) -> Profile:
    """Return what a file of callgrind's says."""
    names: dict[str, str] = {}
    label, total, calls = "", 0, list[Call]()
    caller = callee = ""
    is_call = False
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in map(str.rstrip, lines):
            if is_call:  # of what was called: the place of the call, and the instructions
                calls.append(Call(caller, callee, int(line.split()[1])))
                is_call = False
            elif match := NAME.match(line):
                kind, number, name = match.groups()
                name = names.setdefault(number, name or "")
                caller, callee = (name, callee) if kind == "fn" else (caller, name)
            elif line.startswith("calls="):
                is_call = True
            elif line.startswith(LABEL):
                label = line.removeprefix(LABEL)
            elif line.startswith("totals:"):
                total = int(line.split()[1])
    return Profile(label, total, calls)
