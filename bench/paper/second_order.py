"""SAM's gradient with and without the term that it drops (section 2, appendix C.4): how far apart they point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fused_sam import analysis, batchnorm


def cosine(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    y: Tensor,  # [B]
    rho: float,
) -> float:
    """The cosine of v = grad L(w + e) and of the gradient of w -> L(w + e(w)), for p = 2:

        v + (de/dw)^T v = v + rho / ||g|| H (v - u (u . v)),    u = g / ||g||,  e = rho u,

    with g and H the gradient and the Hessian of the mean cross-entropy at w. The model runs in the mode it is in;
    nothing of it is changed.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with batchnorm.frozen_statistics(model):
        gradients = _gradient(model, params, x, y)
        g = _flat(gradients)
        moved = {name: p + rho / g.norm() * gradients[name] for name, p in params.items()}
        v = _flat(_gradient(model, moved, x, y))
    u = g / g.norm()
    # Of one batch, in the order of the parameters.
    product = analysis.Hessian(model, F.cross_entropy, (x, y)).hvp(v - u * (u @ v))
    return float(F.cosine_similarity(v.double(), v.double() + rho / g.norm() * product, dim=0))


def _gradient(model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(functional_call(model, leaves, (x,)), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])
