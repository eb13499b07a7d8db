"""Launches in ways that the op suites do not have: captured, side by side, in other orders, for an old driver.

Run by test_ptx.py with the plugin; named so that pytest finds it nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from helpers import HYPER, Lists, ascent_groups, bits, scalar, sgd_groups, snapshot
from ptx.plugin import EMULATOR

from fused_sam import ops
from fused_sam.backends import native

SIZES = [20011, 33, 0, 300, 4097]  # of several blocks


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    EMULATOR.configure()
    EMULATOR.library.emulator_set_driver(13000)


# Weights, which a captured launch reads when it is replayed: they must be there then.
PARAMS = [torch.ones(n) for n in SIZES]


def norm_of(grads: list[torch.Tensor], p: float) -> torch.Tensor:
    return ops.norm(PARAMS, grads, ascent_groups(len(grads)), backend="emulated", p=p)


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0], ids=str)
def test_the_norm_has_the_same_bits_in_any_order_of_threads_and_blocks(p: float) -> None:
    grads = [torch.randn(n) for n in SIZES]
    norms = set()
    for seed, (resident, quantum) in enumerate([(1, 0), (3, 0), (2, 7), (6, 60), (40, 900)]):
        EMULATOR.configure(seed=seed, resident=resident, quantum=quantum)
        norms.add(tuple(norm_of(grads, p).flatten().tolist()))
    assert len(norms) == 1


@pytest.mark.parametrize("p", [2.0, 1.0], ids=str)
def test_captured_norms_can_be_replayed_again_and_side_by_side(p: float) -> None:
    """Each has a counter of its own for its blocks: one they shared would end one norm in the middle."""
    lists = [[torch.randn(n) for n in SIZES] for _ in range(3)]
    expected = [norm_of(grads, p).tolist() for grads in lists]
    with EMULATOR.capture():
        captured = [norm_of(grads, p) for grads in lists]
    for seed, together in enumerate([False, False, True, True]):
        EMULATOR.configure(seed=seed, quantum=50)
        for value in captured:
            value.fill_(math.nan)
        EMULATOR.replay(together)
        assert [value.tolist() for value in captured] == expected
        assert norm_of(lists[0], p).tolist() == expected[0]


@pytest.mark.parametrize("driver", [12000, 12010, 13000])
def test_every_driver_gets_launches_that_it_takes(driver: int) -> None:
    """One before CUDA 12.1 takes 4 KB of parameters, so the same list in more launches."""
    EMULATOR.library.emulator_set_driver(driver)
    sizes, results = [k % 5 for k in range(1500)] + SIZES, []
    for backend in ("native", "emulated"):
        torch.manual_seed(0)
        lists = Lists(sizes, torch.float32, "cpu")
        groups = ascent_groups(len(sizes))
        norm = ops.norm(lists.params, lists.grads, groups, backend=backend)
        ops.perturb(lists.params, lists.grads, lists.backups, scalar(2.9, "cpu"), groups, backend)
        lists.update(sgd_groups(len(sizes), **HYPER, nesterov=True), backend=backend)
        results.append((f"{norm.item():.12g}", snapshot(lists.params), snapshot(lists.momentum)))
    assert results[0] == results[1]


@pytest.mark.parametrize("quantum", [3, 100])
def test_updates_have_the_same_bits_however_threads_are_preempted(quantum: int) -> None:
    results = []
    for backend in ("native", "emulated"):
        EMULATOR.configure(seed=quantum, quantum=quantum, resident=5)
        torch.manual_seed(0)
        lists = Lists([257, 33, 1025], torch.bfloat16, "cpu")
        lists.update(sgd_groups(3, **HYPER, dampening=0.3), backend=backend)
        results.append([snapshot(lists.params), snapshot(lists.momentum)])
    assert results[0] == results[1]


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number


def test_backups_are_kept_for_the_stream_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else memory would go back to the stream of the ascent while that of the update reads it."""
    recorded: list[tuple[int, int]] = []
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda x, stream: recorded.append((x.data_ptr(), stream.cuda_stream)),
        raising=False,
    )
    streams = iter([Stream(7), Stream(7), Stream(8)])
    monkeypatch.setattr(native, "current_stream", lambda device: next(streams))
    monkeypatch.setattr(native, "is_on_host", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    params = [torch.randn(n) for n in (5, 3000)]
    before = bits(params[0]), bits(params[1])
    grads = [torch.randn_like(p) for p in params]
    ascent = native.Batch(True, params, grads, None)
    ascent.make_backups(owned=False)
    ascent.perturb(torch.tensor(2.0, dtype=torch.float64), [native.AscentGroup(2, 0.3, False)], 2.0, [])
    assert recorded == []
    ascent.restore()
    assert sorted(recorded) == sorted((memory.data_ptr(), 8) for memory in ascent.core.memory)
    assert recorded != []
    assert (bits(params[0]), bits(params[1])) == before
