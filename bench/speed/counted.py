"""The program that bench.speed.instructions runs under valgrind: VARIANT TENSORS LIBRARY."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence

import torch

from bench.speed.callgrind import Control, Library
from bench.speed.harness import DTYPES, Subject
from bench.speed.rivals import find

# Python specialises code that has run some times: until then a step takes a third more instructions.
WARM_UP_STEPS = 20
STEPS = 2
# What is counted of no half at all: the way from one request to the other.
EMPTY = "empty"
HALVES = ("first", "second")


def label(tensors: int, half: str) -> str:
    """Return the name of what is counted of a half."""
    return f"{tensors} {half}"


def count(subject: Subject, control: Control) -> None:
    """Make steps; count the halves of all but the first ones, and nothing of the gradients between them."""
    optimizer = subject.optimizer
    halves = dict(zip(HALVES, (optimizer.first_step, optimizer.second_step), strict=True))
    for number in range(WARM_UP_STEPS + STEPS):
        for name, half in halves.items():
            subject.assign_gradients()
            if number < WARM_UP_STEPS:
                half(True)
            else:
                _counted(half, control, label(len(subject.params), name))


def _counted(part: Callable[[bool], None], control: Control, name: str) -> None:
    control.start()
    part(True)
    control.stop()
    control.dump(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the steps of a variant on that many tensors, and on one."""
    variant, tensors, library = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    control = Library(library)
    subjects = [Subject(find(variant).build, [(1,)] * n, DTYPES["fp32"]) for n in sorted({1, int(tensors)})]
    gc.collect()
    gc.freeze()
    gc.disable()
    for name in ("warm-up", *[EMPTY] * STEPS):
        _counted(lambda _: None, control, name)
    for subject in subjects:
        count(subject, control)


if __name__ == "__main__":
    main()
