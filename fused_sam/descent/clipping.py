"""The second gradient clipped to a norm (Pascanu et al. 2013), as part of the division by a GradScaler's scale.

    g = g * min(1, max_norm / (||g||_2 + 1e-6))        `torch.nn.utils.clip_grad_norm_`, over all parameters

Every base step divides the gradients by ``grad_scale`` and writes them back, which is also what clipping does: a larger
scale clips. So it takes one more norm and no pass of its own, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sam.backends.memory import overlaps_itself
from fused_sam.parameters import Parameters


def grad_scale(norm: Tensor, max_norm: float, scale: Tensor | None) -> Tensor:
    """Return what to divide gradients of that norm by so that they come out unscaled and clipped: fp32, shape [].

        scale * max(1, (norm / scale + 1e-6) / max_norm)

    It is ``scale`` itself, exactly, where nothing is to be clipped. NaN gradients give NaN.
    """
    factor = torch.ones_like(norm) if scale is None else scale.to(norm)
    return (factor * ((norm / factor + 1e-6) / max_norm).clamp(min=1.0)).float()


def unscale(parameters: Parameters, scale: Tensor) -> None:
    """Write g = g / scale in place, by the fp32 reciprocal that `torch.amp.GradScaler` multiplies by, on the device.

    An expanded gradient cannot be written: a copy takes its place.
    """
    grads: list[Tensor] = []
    for p in parameters.tensors():
        if p.grad is not None and p.grad.layout == torch.strided and overlaps_itself(p.grad):
            p.grad = p.grad.contiguous()
        grads += [] if p.grad is None else [p.grad]
    on_device: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
    for g in parameters.local(grads):
        if g.device not in on_device:
            on_device[g.device] = (scale.to(g.device).double().reciprocal().float(), [])
        multiplier, wide = on_device[g.device]
        if g.dtype in (torch.float32, torch.float64):
            wide.append(g)
        else:  # a tensor as factor would be rounded to the gradient's 16 bits first
            g.copy_(g.float() * multiplier)
    for multiplier, wide in on_device.values():
        if wide:
            torch._foreach_mul_(wide, multiplier)
