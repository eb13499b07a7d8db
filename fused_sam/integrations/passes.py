"""What the integrations share: the micro-batches of a step run at w as they come, and all of them again at w + e."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from fused_sam import rng
from fused_sam.optimizer import FusedSAM

Pass: TypeAlias = Callable[[], Any]
NoSync: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]


def sam_of(optimizer: Any) -> FusedSAM:
    """Return the FusedSAM in wrappers that have what they wrap as ``optimizer``.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    while inner is not None and not isinstance(inner, FusedSAM):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise TypeError(f"Invalid optimizer of class {type(optimizer).__name__}. Must be a FusedSAM.")
    return inner


@dataclass
class MicroBatches:
    """The micro-batches of a step of ``sam`` whose gradients are in p.grad."""

    sam: FusedSAM
    _passes: list[tuple[Pass, rng.RNGState | None]] = field(default_factory=list)

    @classmethod
    def of(cls, optimizer: Any, before: MicroBatches | None) -> MicroBatches:
        """Return those of a step of the optimizer: the ones there were before, unless they are of another.

        Raises:
            TypeError: if there is no FusedSAM.
        """
        sam = sam_of(optimizer)
        return before if before is not None and before.sam is sam else cls(sam)

    def along_momentum(self) -> bool:
        """Go to w + e if that takes no gradient and is due; return whether it takes none."""
        if self.sam.direction != "momentum":
            return False
        if self.sam.perturb_next:
            self.sam.first_step()
        return True

    def run(
        self,
        whole: Pass,
        last: bool,
        no_sync: NoSync = contextlib.nullcontext,
        at_w: Pass | None = None,
    ) -> Any:
        """Make the pass of the next micro-batch and return its result; after the ``last``, all passes at w + e.

        The weights are at w after each call, but after the last one, in a step that is perturbed, at w + e: there
        `FusedSAM.step` takes the gradients. Along the momentum each pass is made at w + e, and there are no others.

        Args:
            whole: forward and backward of this micro-batch; it may be called until the step is made.
            last: whether a step follows.
            no_sync: makes the context of passes at w + e whose gradients are not averaged: all but the last.
            at_w: is called at w instead.
        """
        with self.given_up_on_error():
            if self.sam.perturbed:
                raise RuntimeError("A micro-batch while the weights are perturbed. Call step() or restore() first.")
            if self.along_momentum():
                result = whole()
                if not last:  # what comes between, an evaluation or the end of training, is to find w
                    self.sam.restore()
                return result
            self.keep(whole)
            result = whole() if at_w is None else at_w()
            if last:
                if self.ascend(no_sync):
                    self.replay(no_sync)
                self.forget()
            return result

    def keep(self, whole: Pass) -> None:
        """Keep a pass that is about to be made at w; before its forward, since random numbers may be replayed."""
        params = self._params()
        if all(p.grad is None for p in params):
            self.forget()  # a loop that was left before its step has dropped these gradients since
        self._passes.append((whole, rng.capture({p.device for p in params}) if self.sam.replay_rng else None))

    def ascend(self, no_sync: NoSync) -> bool:
        """Go to w + e, in as many steps as are due, with the passes between them. Return whether the weights moved."""
        while self.sam.perturb_next:
            self.sam.first_step(zero_grad=True)
            if self.sam.perturb_next:
                self.replay(no_sync)
        return self.sam.perturbed

    def replay(self, no_sync: NoSync) -> list[Any]:
        """Make all passes again where the weights are; return their results."""
        results = []
        for number, (whole, state) in enumerate(self._passes, start=1):
            if state is not None:
                rng.replay(state)
            with no_sync() if number < len(self._passes) else contextlib.nullcontext():
                results.append(whole())
        return results

    def adding(self, closure: Pass) -> Pass:
        """Return the closure so that it adds to the gradients of earlier micro-batches: step(closure) zeroes at w."""
        params = self._params()
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None

        def added() -> Any:
            for p, grad in zip(params, grads):
                p.grad = grad
            return closure()

        return added

    def forget(self) -> None:
        """Forget the passes: the step has been made, or never will be."""
        self._passes.clear()

    @contextlib.contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """Go back to w on any exception in the block, and drop the gradients: what is left of a step is none."""
        try:
            yield
        except BaseException:
            self.forget()
            self.sam.restore()
            self.sam.zero_grad()
            raise

    def _params(self) -> list[Tensor]:
        return [p for group in self.sam.param_groups for p in group["params"]]
