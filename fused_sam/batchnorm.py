"""Running statistics of normalisation layers, updated by the first pass only.

Both passes of a SAM step see the same examples. Counting them twice, the second time at w + e, gives statistics that
belong to no weights the model is ever evaluated at (the official implementation keeps those of the first pass).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fused_sam.optimizer import FusedSAM


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave ``running_mean``, ``running_var`` and ``num_batches_tracked`` of all norm layers alone inside the block.

    Layers in training mode go on normalising by the batch; layers in evaluation mode are not touched. May be nested.
    Covers BatchNorm, SyncBatchNorm and InstanceNorm, whatever their momentum (None too).
    """
    with _frozen(_norm_layers(model)):
        yield


def _norm_layers(model: nn.Module) -> list[_NormBase]:
    return [m for m in model.modules() if isinstance(m, _NormBase)]


@contextlib.contextmanager
def _frozen(layers: Iterable[_NormBase]) -> Iterator[None]:
    # Not tracking, a layer in training mode uses the batch's statistics and counts nothing. InstanceNorm updates
    # whatever buffers it has even then, so they are out of its sight. Layers that are frozen already are left alone.
    frozen = [(m, m.running_mean, m.running_var) for m in layers if m.training and m.track_running_stats]
    for module, _, _ in frozen:
        module.track_running_stats = False
        module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, mean, variance in frozen:
            module.track_running_stats = True
            module.running_mean, module.running_var = mean, variance


def _compile_anew() -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class FirstPassOnly:
    """Handle of `first_pass_only`; ``remove()`` undoes it. A copy of the model is free of it."""

    def __init__(self, model: nn.Module, is_second_pass: Callable[[], bool]) -> None:
        self._is_second_pass: Callable[[], bool] | None = is_second_pass
        self._running: dict[nn.Module, list[contextlib.AbstractContextManager[None]]] = {}
        # On each layer and not on the model: a training loop need not go through the model's own forward.
        self._hooks = [
            hook
            for layer in _norm_layers(model)
            for hook in (
                layer.register_forward_pre_hook(self._enter),
                layer.register_forward_hook(self._exit, always_call=True),
            )
        ]

    def _enter(self, layer: Any, args: object) -> None:
        counted = self._is_second_pass is not None and self._is_second_pass()
        context = _frozen([layer]) if counted else contextlib.nullcontext()
        context.__enter__()
        self._running.setdefault(layer, []).append(context)

    def _exit(self, layer: Any, args: object, output: object) -> None:
        # An earlier pre-hook that raises means that _enter never ran.
        if self._running.get(layer):
            self._running[layer].pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Take the hooks off the model: both passes then update the statistics."""
        for hook in self._hooks:
            hook.remove()
        _compile_anew()

    def __getstate__(self) -> dict[str, Any]:
        # The hooks travel with a model that is copied or pickled. The optimizer does not: it steps another model.
        return {"_is_second_pass": None, "_running": {}, "_hooks": []}


def first_pass_only(model: nn.Module, optimizer: FusedSAM) -> FirstPassOnly:
    """Freeze the statistics of every norm layer of ``model`` while ``optimizer`` holds the weights at w + e.

    One line at set-up; the closure form and the two-call form then need nothing more::

        fused_sam.batchnorm.first_pass_only(model, optimizer)

    With ``direction="momentum"``, which makes no pass at w, the only pass of a step updates them.

    What torch.compile has compiled before is compiled anew: of a model that has run it does not see new hooks.
    """
    _compile_anew()
    # Along the momentum there is no pass at w: the one at w + e has to count.
    return FirstPassOnly(model, lambda: optimizer.perturbed and optimizer.direction == "gradient")
