"""SAM steps in timm's train loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor

from fused_sam.integrations.passes import MicroBatches, NoSync


class SAMScaler(NativeScaler):
    """A NativeScaler that runs the micro-batches of a step again at w + e before it clips and steps.

    A call needs one more argument, ``forward``, which returns the loss of this micro-batch as the loop has made it,
    divided by the number of micro-batches. It is called after the loop has gone on to other batches, so it must hold
    its own: ``functools.partial(forward, input, target)``, or a function with the default arguments
    ``input=input, target=target``.

    With ``direction="momentum"`` the loss that the loop has made at w is not used, and ``forward`` is called once.
    After an exception in a call the weights are at w and the gradients are None. ``clip_mode="agc"`` compares the
    gradients with the weights at w + e.

    Args:
        device: type of the device, for `torch.amp.GradScaler`.
        enabled: False for bf16 and fp32, where timm makes no scaler.
        no_sync: ``no_sync`` of a model in DistributedDataParallel: saves the averaging of all but the last micro-batch.
    """

    def __init__(self, device: str = "cuda", *, enabled: bool = True, no_sync: NoSync = contextlib.nullcontext) -> None:
        super().__init__(device)
        if not enabled:
            self._scaler = torch.amp.GradScaler(device, enabled=False)
        self._no_sync = no_sync
        self._micro_batches: MicroBatches | None = None

    def __call__(
        self,
        loss: Tensor,
        optimizer: Any,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
        *,
        forward: Callable[[], Tensor],
    ) -> None:
        """Make the backward of a micro-batch and, if ``need_update``, the whole step.

        Raises:
            TypeError: if the optimizer is no FusedSAM.
            ValueError: for ``create_graph``, ``clip_grad`` without ``parameters``, or an optimizer with ``replay_rng``.
            RuntimeError: if variables that ``forward`` reads from an enclosing function have changed when it is called.
        """
        micro_batches = self._micro_batches = MicroBatches.of(optimizer, self._micro_batches)
        if create_graph:
            raise ValueError(f"Invalid {create_graph=}. Must be False with SAM.")
        if clip_grad is not None and parameters is None:
            raise ValueError(f"Invalid {parameters=} with {clip_grad=}. Must be what is clipped.")
        if micro_batches.sam.replay_rng:
            raise ValueError("Invalid replay_rng=True. Must be False: the first forward has been made already.")
        require_same = _watch(forward)

        def whole() -> None:
            require_same()
            self._scaler.scale(forward()).backward()

        def at_w() -> None:
            self._scaler.scale(loss).backward()

        with micro_batches.given_up_on_error():
            micro_batches.run(whole, need_update, self._no_sync, at_w)
            if not need_update:
                return
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            self._scaler.step(optimizer)
            self._scaler.update()


def _watch(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Return what raises RuntimeError once a variable that a nested function reads has got another value."""
    function = getattr(forward, "func", forward)  # of a partial
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    before = [_content(cell) for cell in cells]

    def require_same() -> None:
        for name, cell, content in zip(names, cells, before):
            if _content(cell) is not content:
                raise RuntimeError(
                    f"forward reads {name!r}, which has changed since: it would run another batch. Give it its own "
                    "by functools.partial or a default argument."
                )

    return require_same


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # deleted, or not assigned yet
        return None
