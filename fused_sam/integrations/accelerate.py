"""SAM steps with Accelerate, with gradient accumulation and mixed precision."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from fused_sam.integrations.passes import MicroBatches, NoSync, sam_of


def no_sync_of(accelerator: Accelerator, model: nn.Module) -> NoSync:
    """Return what makes contexts in which a backward does not average gradients, unless each one is asked to."""
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return contextlib.nullcontext
    return functools.partial(accelerator.no_sync, model)


class SAMStep:
    """A training step for one micro-batch, in place of the body of a loop with ``accelerator.accumulate``.

    The last micro-batch of a step (``accelerator.sync_gradients``) makes the step: all micro-batches of it are run
    again at w + e, then gradients are clipped if asked, and weights updated::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        step = SAMStep(accelerator, model, optimizer, lambda model, batch: loss_fn(model(batch[0]), batch[1]))
        for batch in loader:
            loss = step(batch)
            scheduler.step()

    After an exception in a call, KeyboardInterrupt included, the weights are at w and the gradients are None.

    Args:
        accelerator: whose ``gradient_accumulation_steps`` counts, and whose precision.
        model: what ``accelerator.prepare`` returned.
        optimizer: likewise, around a FusedSAM.
        loss_fn: is called with the model and a batch and returns the mean loss, not divided.
        max_grad_norm: of the gradient that the update gets; None does not clip.

    Raises:
        TypeError: if the optimizer is no FusedSAM, or has not been prepared.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        max_grad_norm: float | None = None,
    ) -> None:
        self.sam = sam_of(optimizer)
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise TypeError("Invalid optimizer of class FusedSAM. Must be what accelerator.prepare returned.")
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.max_grad_norm = max_grad_norm
        self._micro_batches = MicroBatches(self.sam)

    def __call__(self, batch: Any) -> Tensor:
        """Return the loss of the batch at w, detached; with ``direction="momentum"`` that at w + e."""
        accelerator, micro_batches = self.accelerator, self._micro_batches
        with accelerator.accumulate(self.model), micro_batches.given_up_on_error():
            whole, last = functools.partial(self._pass, batch), accelerator.sync_gradients
            loss = micro_batches.run(whole, last, no_sync_of(accelerator, self.model))
            if last:
                if self.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return loss

    def _pass(self, batch: Any) -> Tensor:
        loss = self.loss_fn(self.model, batch)
        self.accelerator.backward(loss)
        return loss.detach()
