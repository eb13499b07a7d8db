"""SAM steps in automatic optimization of PyTorch Lightning, by either of its names; it imports neither."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fused_sam.integrations.passes import MicroBatches

if TYPE_CHECKING:
    Hooks = Any  # those of the LightningModule, which comes after the mixin
else:
    Hooks = object


class SAMModule(Hooks):
    """A mixin for a LightningModule whose automatic optimization has a FusedSAM: ``Net(SAMModule, LightningModule)``.

    With it ``accumulate_grad_batches`` > 1 and ``precision="16-mixed"`` work: all micro-batches of a step are run again
    at w + e, and ``gradient_clip_val`` clips the gradient there. ``self.log`` logs the first run only; all else that
    ``training_step`` does, such as updates of metrics, it does in both, and ``self.optimizers().perturbed`` tells them
    apart. Where the module has ``on_train_batch_start``, ``optimizer_step``, ``backward`` or ``log`` of its own, they
    must call ``super()``.

    Raises:
        TypeError: in the first step, if the optimizer is no FusedSAM, or ``training_step`` takes a ``dataloader_iter``.
    """

    _micro_batches: MicroBatches | None = None
    _begins = False  # a training_step of Lightning's own comes next: not ours, nor one that validation_step calls
    _steps = False  # optimizer_step is running
    _replays = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        training_step = getattr(cls, "training_step", None)
        if training_step is not None and not hasattr(training_step, "guarded"):
            cls.training_step = _guarded(training_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Keep the batch for the run at w + e."""
        response = super().on_train_batch_start(batch, batch_idx)
        if not self.automatic_optimization:
            return response
        micro_batches = self._micro_batches = MicroBatches.of(self.trainer.optimizers[0], self._micro_batches)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # where Lightning zeroes the gradients, later
            micro_batches.forget()
        micro_batches.keep(functools.partial(self._pass, self._arguments(batch, batch_idx)))
        self._begins = True
        return response

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do as the LightningModule, at w or w + e; between micro-batches the weights are at w."""
        if not self.automatic_optimization or self._micro_batches is None:
            return super().backward(loss, *args, **kwargs)
        with self._micro_batches.given_up_on_error():
            super().backward(loss, *args, **kwargs)
        if not self._steps:
            self._micro_batches.sam.restore()  # along the momentum; what comes between may be an evaluation
        return None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Run the last micro-batch at w and all of them at w + e, and make the step.

        Raises:
            RuntimeError: if `on_train_batch_start` has not been called.
        """
        micro_batches = self._micro_batches
        if micro_batches is None or not self._begins or optimizer_closure is None:
            raise RuntimeError("SAMModule.on_train_batch_start was not called: the module's own must call super().")
        self._steps = True
        try:
            with micro_batches.given_up_on_error():
                second_half = self._second_half(micro_batches, optimizer_closure)
                super().optimizer_step(epoch, batch_idx, optimizer, second_half)
        finally:
            self._steps = False
            micro_batches.forget()
            micro_batches.sam.restore()  # where Lightning makes no step, since no training_step has returned a loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Do as the LightningModule; nothing in a run at w + e that follows one at w."""
        if not self._replays:
            super().log(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module is stepped by another optimizer.
        fresh = {"_micro_batches": None, "_begins": False, "_steps": False, "_replays": False}
        return {**super().__getstate__(), **fresh}

    def _second_half(self, micro_batches: MicroBatches, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure for `FusedSAM.step`, which calls it once, where the weights are when this returns."""
        sam = micro_batches.sam
        if micro_batches.along_momentum():
            return closure if sam.perturbed else micro_batches.adding(closure)
        if not sam.perturb_next:
            return micro_batches.adding(closure)
        no_sync = getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        closure()
        micro_batches.ascend(no_sync)
        return functools.partial(self._losses, micro_batches, no_sync)

    def _losses(self, micro_batches: MicroBatches, no_sync: Any) -> Any:
        """Make all passes; return a loss, or None if no pass has one: then there is no gradient."""
        return next((loss for loss in micro_batches.replay(no_sync) if loss is not None), None)

    def _pass(self, arguments: tuple[Any, ...]) -> Any:
        """Do what Lightning does for a micro-batch, but its bookkeeping. Return the loss, None for none."""
        trainer = self.trainer
        self._replays = True
        try:
            output = trainer.strategy.training_step(*arguments)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is not None:
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])
            return None if loss is None else loss.detach()
        finally:
            self._replays = False

    def _arguments(self, batch: Any, batch_idx: int) -> tuple[Any, ...]:
        """Return what Lightning calls training_step with: the index if there is a place for it."""
        signature = inspect.signature(self.training_step)
        if "dataloader_iter" in signature.parameters:
            raise TypeError("Invalid training_step(dataloader_iter). Must take a batch, to be run twice.")
        try:
            signature.bind(batch, batch_idx)
        except TypeError:
            return (batch,)
        return batch, batch_idx


def _guarded(training_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method so that Lightning's own call of it goes to w + e first if that takes no gradient.

    Nothing else can go back if it fails: of a micro-batch that is not the last no hook sees that.
    """

    @functools.wraps(training_step)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._begins:
            return training_step(self, *args, **kwargs)
        self._begins = False
        micro_batches: MicroBatches = self._micro_batches
        with micro_batches.given_up_on_error():
            micro_batches.along_momentum()
            return training_step(self, *args, **kwargs)

    guarded.guarded = True  # type: ignore[attr-defined]
    # Lightning looks through one wrapper for the names of the arguments, and there may have been one.
    guarded.__wrapped__ = getattr(training_step, "__wrapped__", training_step)
    return guarded
