"""The Hessian of a loss as an operator: products with vectors, and never the matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam.analysis.objective import LossFn, Objective, flat, require_examples, split


class Hessian:
    r"""H = :math:`\nabla^2 L(w)`, L being the mean of ``loss_fn(model(x), y)`` over the examples of ``data``.

    A product goes over all of the data once and costs about four times the forward passes (Pearlmutter 1994:
    :math:`H v = \nabla_w (\nabla_w L \cdot v)`). It is computed in the dtype of the parameters and added up over
    batches in fp64. What the model runs must have a second derivative in torch: attention kernels may need
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, recurrent layers ``torch.backends.cudnn.flags(enabled=False)``.

    Args:
        model: called as ``model(x)``, in the mode it is in. Weights, modes, running statistics and ``p.grad`` are not
            touched.
        loss_fn: called as ``loss_fn(output, y)``; returns the mean over the batch.
        data: batches ``(x, y)`` that can be gone over more than once, or one pair of tensors, the whole data set.
        params: the weights to differentiate by, one after another in the vectors; None for all that require a gradient.
        replay_rng: start every product from the random state found now, so that all products are with one matrix also
            with dropout, and leave the generators as they were found.

    Attributes:
        size: the number of weights, n.
        products: how many were made so far.

    Raises:
        TypeError, ValueError: as `sharpness`, for data and parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        replay_rng: bool = True,
    ) -> None:
        self._objective = Objective(model, loss_fn, data, params, replay_rng)
        self.size = sum(p.numel() for p in self._objective.params)
        self.products = 0

    @property
    def device(self) -> torch.device:
        """Return the device of the vectors."""
        return self._objective.device

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, fp64, shape [n], for a vector v of shape [n], of any dtype and on any device.

        Raises:
            ValueError: for another shape.
        """
        if v.shape != (self.size,):
            raise ValueError(f"Invalid v of shape {list(v.shape)}. Must be [{self.size}], the number of weights.")
        params = self._objective.params
        v = v.detach().to(self.device, torch.float64)
        directions = [x.to(p.device, p.dtype) for x, p in zip(split(v, params), params)]
        total, size = torch.zeros_like(v), 0
        with self._objective.untouched(), torch.enable_grad():
            for batch in self._objective:
                total += batch.size * self._product(self._objective.loss(batch), directions)
                size += batch.size
        self.products += 1
        return total / require_examples(size)

    def _product(self, loss: Tensor, directions: list[Tensor]) -> Tensor:
        params = self._objective.params
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(loss, params, create_graph=True, **options)
        # A gradient that does not depend on any weight has no second derivative to ask for.
        curved = [(g, v) for g, v in zip(grads, directions) if g.requires_grad]
        if not curved:
            return torch.zeros(self.size, dtype=torch.float64, device=self.device)
        return flat(torch.autograd.grad([g for g, _ in curved], params, [v for _, v in curved], **options))

    def linear_operator(self) -> Any:
        """Return H as a `scipy.sparse.linalg.LinearOperator` of float64, for its eigensolvers and linear solvers.

        Raises:
            ModuleNotFoundError: without scipy (``pip install '.[analysis]'``).
        """
        from scipy.sparse.linalg import LinearOperator

        def matvec(v: Any) -> Any:
            return self.hvp(torch.as_tensor(v.reshape(-1))).cpu().numpy()

        return LinearOperator((self.size, self.size), matvec=matvec, rmatvec=matvec, dtype="float64")
