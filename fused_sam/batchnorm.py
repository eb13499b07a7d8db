"""Running statistics of normalisation layers, updated by the first pass only.

Both passes of a SAM step see the same examples. Counting them twice, the second time at w + e, gives statistics that
belong to no weights the model is ever evaluated at (the official implementation keeps those of the first pass).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fused_sam.optimizer import FusedSAM


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave ``running_mean``, ``running_var`` and ``num_batches_tracked`` of all norm layers alone inside the block.

    Layers in training mode go on normalising by the batch; layers in evaluation mode are not touched. May be nested.
    Covers BatchNorm, SyncBatchNorm and InstanceNorm, whatever their momentum (None too).
    """
    tracking = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


class FirstPassOnly:
    """Handle of `first_pass_only`; ``remove()`` undoes it."""

    def __init__(self, model: nn.Module, optimizer: FusedSAM) -> None:
        self._optimizer = optimizer
        self._running: list[contextlib.AbstractContextManager[None]] = []
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._exit, always_call=True),
        ]

    def _enter(self, model: nn.Module, args: object) -> None:
        context = frozen_statistics(model) if self._optimizer.perturbed else contextlib.nullcontext()
        context.__enter__()
        self._running.append(context)

    def _exit(self, model: nn.Module, args: object, output: object) -> None:
        # An earlier pre-hook that raises means that _enter never ran.
        if self._running:
            self._running.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def first_pass_only(model: nn.Module, optimizer: FusedSAM) -> FirstPassOnly:
    """Freeze the statistics in every forward of ``model`` while ``optimizer`` holds the weights at w + e.

    One line at set-up; the closure form and the two-call form then need nothing more::

        fused_sam.batchnorm.first_pass_only(model, optimizer)
    """
    return FirstPassOnly(model, optimizer)
