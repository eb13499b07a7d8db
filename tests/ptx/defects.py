"""Puts defects into the PTX of the kernels, one at a time, and prints what is found of each: a test of the tests.

Each runs in a process of its own, since a core can be loaded only once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import torch
from ptx import emulator as loader

# What is replaced, as regular expressions; each is there in the PTX of every architecture.
DEFECTS = {
    "none": ("", ""),
    "no fence before a block counts itself": (r"membar\.gl;((?:[^;]*;){1,9}?\s*atom\.)", r"\1"),
    "no fence in the last block": (r"(atom\.global\.inc[^}]*?)membar\.gl;", r"\1"),
    "no barrier": (r"bar(rier)?\.sync\s+0;", ""),
    "greater for at least": (r"setp\.ge\.u32", "setp.gt.u32"),
    "no block is the last": (r"atom\.global\.inc\.u32", "atom.global.dec.u32"),
    "a shuffle without its last lane": (r"(shfl\.sync[^;]*), *[^,;]+;", r"\1, 0x7fffffff;"),
    "a shuffle of the wrong lane": (r"shfl\.sync\.down", "shfl.sync.up"),
    "too wide a load": (r"ld\.global\.f32", "ld.global.f64"),
    "too narrow a load": (r"ld\.global\.v4\.f32\s*\{([^,]*,[^,]*),[^}]*\}", r"ld.global.v2.f32 {\1}"),
    "a quotient upside down": (r"div\.rn\.f32 (%f\d+), (%f\d+), (%f\d+);", r"div.rn.f32 \1, \3, \2;"),
}
TRITON_DEFECTS = {
    "none": ("", ""),
    "no barrier": (r"bar(rier)?\.sync\s+0;", ""),
    "one element too many": (r"setp\.lt\.s32", "setp.le.s32"),
    "a shuffle of the wrong lane": (r"shfl\.sync\.bfly", "shfl.sync.up"),
    "too wide a load": (r"ld\.global\.b32", "ld.global.b64"),
    "a sum of the wrong number": (r"fma\.rn\.f32\s+(\S+),\s+(\S+),\s+(\S+),\s+(\S+);", r"fma.rn.f32 \1, \2, \3, \3;"),
}
TRITON = os.environ.get("PTX_TRITON")
HERE = TRITON_DEFECTS if TRITON else DEFECTS


def edited_by(name: str) -> tuple[Any, list[int]]:
    """Return the change of a text, and the list that will hold how many places it changed in each."""
    pattern, replacement = HERE[name]
    counts: list[int] = []

    def change(text: str) -> str:
        changed, count = re.subn(pattern, replacement, text) if pattern else (text, 0)
        counts.append(count)
        return changed

    return change, counts


def differences() -> list[str]:
    """Return which results of a few ops are not those of the CPU's kernels."""
    from helpers import HYPER, AdamLists, Lists, adam_groups, ascent_groups, sgd_groups, snapshot
    from ptx import bounds, triton_driver

    from fused_sam import backends, ops

    if TRITON:
        triton_driver.install(EMULATOR, int(TRITON))
        bounds.watch_triton(EMULATOR)
    else:
        from ptx.backend import BACKEND

        bounds.watch_native(EMULATOR)
        backends.REGISTRY = (*backends.REGISTRY, BACKEND)
    tested = "triton" if TRITON else "emulated"
    sizes = [20011, 33, 0, 300, 4097, 16384]
    results: dict[str, dict[str, Any]] = {"native": {}, tested: {}}
    for backend, found in results.items():
        torch.manual_seed(0)
        lists, adam = Lists(sizes, torch.float32, "cpu"), AdamLists(sizes, torch.float32, "cpu")
        groups = ascent_groups(len(sizes), adaptive=True)
        for turn in ("first norm", "second norm"):
            # The order of the sum is another one on the CPU.
            found[turn] = f"{ops.norm(lists.params, lists.grads, groups, backend=backend).item():.12g}"
        found["peak"] = ops.norm(lists.params, lists.grads, groups, backend=backend, p=1).tolist()
        norm = torch.tensor(2.9, dtype=torch.float64)
        ops.perturb(lists.params, lists.grads, lists.backups, norm, groups, backend)
        found["perturb"] = snapshot(lists.params)
        lists.update(sgd_groups(len(sizes), **HYPER, dampening=0.3), backend=backend)
        found["sgd"] = snapshot(lists.params), snapshot(lists.momentum)
        adam.update(adam_groups(len(sizes), lr=0.013, amsgrad=True, weight_decay=0.17), backend=backend)
        found["adam"] = snapshot(adam.params), [snapshot(states) for states in adam.states]
    return [name for name, value in results["native"].items() if results[tested].get(name) != value]


def look_for(name: str) -> dict[str, Any]:
    """Return in how many places a defect was put, and what was found: reports, wrong results, an error."""
    change, counts = edited_by(name)
    EMULATOR.edit(change)
    if not TRITON:
        sys.meta_path.insert(0, loader.NativeFinder)
    found: list[str] = []
    try:
        found += [f"{what} differs" for what in differences()]
    except RuntimeError as error:
        found.append(str(error))
    # Each loads what it launches: of Triton's kernels, too, a process has its own.
    return {"places": sum(counts), "reports": EMULATOR.take_reports()[:3], "found": found}


def in_a_process_of_its_own(name: str) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(look_for(name)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else {"places": 1, "reports": [], "found": ["the process crashed"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    EMULATOR = loader.Emulator(os.environ["PTX_EMULATOR"])
    print(json.dumps({name: in_a_process_of_its_own(name) for name in sys.argv[1:] or HERE}))
