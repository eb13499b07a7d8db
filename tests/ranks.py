"""Real processes with a gloo group, which run functions of the tests: started once, since a start costs seconds."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

COLLECTIVE_SECONDS = 300  # until a collective that a rank does not come to raises on the others
CASE_SECONDS = 600  # until a case is ended by force: no failure may hang


class Ranks:
    """``size`` processes. A case that fails on any of them ends all; the next one finds new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns on each rank. It and its arguments must be picklable, and so its result."""
        results = self.outcomes(case, *args, **kwargs)
        failures = [f"rank {r}: {error}" for r, (ok, error) in enumerate(results) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def outcomes(self, case: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[bool, Any]]:
        """(True, result), or (False, traceback) where it raised or the rank was lost; one for each rank."""
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((case, args, kwargs))
        except BrokenPipeError:  # a process was ended since the last case
            self.close()
            raise
        results: list[tuple[bool, Any]] = [(False, f"no answer within {CASE_SECONDS} s")] * self.size
        waiting, deadline = dict(zip(self._pipes, range(self.size))), time.monotonic() + CASE_SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            # A process that has died closes its sentinel; its pipe may be open in the one that forked it.
            wait([*waiting, *(self._processes[rank].sentinel for rank in waiting.values())], left)
            for pipe, rank in list(waiting.items()):
                alive = self._processes[rank].is_alive()
                answered = pipe.poll()
                if not answered and alive:
                    continue
                del waiting[pipe]
                try:
                    results[rank] = pipe.recv() if answered else (False, self._death_of(rank))
                except (EOFError, ConnectionResetError):  # what came was the end of the pipe
                    results[rank] = False, self._death_of(rank)
        if not all(ok for ok, _ in results):
            self.close()
        return results

    def _death_of(self, rank: int) -> str:
        self._processes[rank].join()
        return f"the process died, exit code {self._processes[rank].exitcode}"

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        # Forked from a process that has imported everything once, and has never computed. The first optimizer of a
        # process imports torch._dynamo, which takes most of a start.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "helpers", "fused_sam"])
        store = Path(tempfile.mkdtemp(prefix="ranks")) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a rank that crashes says where
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=COLLECTIVE_SECONDS), world_size=size, rank=rank
    )
    with contextlib.suppress(EOFError):
        while True:
            case, args, kwargs = pipe.recv()
            torch.manual_seed(0)
            faulthandler.dump_traceback_later(CASE_SECONDS * 0.9)  # and one that hangs
            try:
                pipe.send((True, case(*args, **kwargs)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
            faulthandler.cancel_dump_traceback_later()


def _on(fixture: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            arguments.pop(fixture).run(_run_body, body.__module__, body.__name__, arguments)

        own = inspect.Parameter(fixture, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *inspect.signature(body).parameters.values()])  # type: ignore[attr-defined]
        return test

    return decorate


def _run_body(module: str, test: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), test).__wrapped__(**arguments)


# Decorators of a test whose body runs on each of two or four ranks.
on_pair, on_four = _on("pair"), _on("four")
