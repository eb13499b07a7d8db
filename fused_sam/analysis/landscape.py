"""The loss on a line or a plane through the weights (Li et al. 2018, Visualizing the Loss Landscape of Neural Nets)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_sam import ops
from fused_sam.analysis.objective import LossFn, Objective, flat, split

Direction = Sequence[Tensor]


class Landscape(NamedTuple):
    """The loss at w + sum_k c_k d_k.

    Attributes:
        coordinates: the values of each c_k, fp64, shape [n_k].
        loss: at each combination of them, fp64, shape [n_1] or [n_1, n_2].
    """

    coordinates: tuple[Tensor, ...]
    loss: Tensor


def random_direction(
    params: Iterable[Tensor], *, seed: int = 0, normalise: bool = True, vectors: bool = False
) -> list[Tensor]:
    r"""Return a random direction, filter-normalised (Li et al. 2018, section 4):

    .. math:: d_{i,j} \leftarrow \frac{d_{i,j}}{\lVert d_{i,j} \rVert} \lVert w_{i,j} \rVert

    for filter j of tensor i, drawn from a normal distribution. So the distance 1 is as far for every filter as the
    origin is, and pictures of different networks can be compared although their weights differ in scale. Filters are
    what the first index of a tensor tells apart: output channels of a convolution, neurons of a linear layer.

    Args:
        params: w.
        seed: of the draw; the same on any device.
        normalise: False leaves the draw as it is.
        vectors: whether tensors of fewer than two dimensions, biases and the parameters of normalisation layers, move;
            each is one filter then. False, as in the paper, keeps them where they are.

    Returns:
        A tensor for each parameter, fp64.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for p in params:
        # Drawn in any case, so that the rest of the direction does not depend on `vectors`.
        d = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        if p.dim() < 2 and not vectors:
            d = torch.zeros_like(d)
        direction.append(_as_long_as(d, p.detach().double()) if normalise else d)
    return direction


def _as_long_as(d: Tensor, w: Tensor) -> Tensor:
    """Return d with each filter scaled to the 2-norm of the same filter of w."""
    dims = tuple(range(1, w.dim())) if w.dim() > 1 else None
    lengths, wanted = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (d, w))
    return d * torch.where(lengths > 0, wanted / lengths, 0.0)


def difference(model: nn.Module, other: nn.Module) -> list[Tensor]:
    """Return the direction from the weights of one model to those of another, whose loss it reaches at 1.

    Buffers stay those of ``model``: running statistics do not travel along.

    Returns:
        A tensor for each parameter of ``model`` that requires a gradient, fp64.

    Raises:
        ValueError: if the parameters differ in name or shape.
    """
    theirs = dict(other.named_parameters())
    direction = []
    for name, p in model.named_parameters():
        shape = list(theirs[name].shape) if name in theirs else None
        if shape != list(p.shape):
            raise ValueError(f"Invalid other model: {name} has shape {shape}. Must be {list(p.shape)}.")
        if p.requires_grad:
            direction.append(theirs[name].detach().to(p.device, torch.float64) - p.detach().double())
    return direction


@torch.no_grad()
def landscape(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    directions: Sequence[Direction],
    coordinates: Sequence[Any],
    *,
    params: Iterable[Tensor] | None = None,
    replay_rng: bool = True,
    backend: str | None = None,
) -> Landscape:
    """Return the loss at w + c_1 d_1 (one direction) or w + c_1 d_1 + c_2 d_2 (two), for all pairs of coordinates.

    Each point takes a forward pass over the data, in the model's mode: in training mode BatchNorm normalises by each
    batch, else by the statistics of w. The sum is formed in fp64 and rounded once, so that 0 is w itself. The weights
    come back bit for bit, also after an exception; modes, running statistics and ``p.grad`` are not touched.

    Args:
        model: called as ``model(x)``.
        loss_fn: called as ``loss_fn(output, y)``; returns the mean over the batch.
        data: batches ``(x, y)`` that can be gone over more than once, or one pair of tensors, the whole data set.
        directions: one or two, each a tensor for every parameter, of its shape: `random_direction` or `difference`.
        coordinates: for each direction the values of its coordinate, a list or a tensor of one dimension.
        params: the weights that move; None for all that require a gradient.
        replay_rng: start every point from the random state found now, and leave the generators as they were found.
        backend: of the op that restores the weights, as in `FusedSAM`.

    Raises:
        ValueError: for directions or coordinates that do not fit, or data without examples.
        TypeError: for data that is not iterable, or only once.
    """
    objective = Objective(model, loss_fn, data, params, replay_rng)
    vectors = _vectors(directions, objective.params)
    axes = _axes(coordinates, len(vectors))
    backups = [p.clone() for p in objective.params]
    ops.restore(objective.params, backups, backend)  # What it refuses is refused here, with nothing changed.
    w = flat(backups)
    losses = []
    with objective.untouched():
        try:
            for point in itertools.product(*(axis.tolist() for axis in axes)):
                there = w + sum(c * d for c, d in zip(point, vectors))
                for p, x in zip(objective.params, split(there, objective.params)):
                    p.copy_(x)
                losses.append(objective.mean_loss())
        finally:
            ops.restore(objective.params, backups, backend)
    return Landscape(axes, torch.stack(losses).cpu().view([len(axis) for axis in axes]))


def _axes(coordinates: Sequence[Any], count: int) -> tuple[Tensor, ...]:
    """Return the coordinates of each of ``count`` directions."""
    axes = tuple(torch.as_tensor(c, dtype=torch.float64).detach().cpu() for c in coordinates)
    if len(axes) != count or any(axis.dim() != 1 or not len(axis) for axis in axes):
        shapes = [list(axis.shape) for axis in axes]
        raise ValueError(f"Invalid coordinates of shapes {shapes}. Must be one non-empty list for each direction.")
    return axes


def _vectors(directions: Sequence[Direction], params: list[Tensor]) -> list[Tensor]:
    """Return each direction as one vector."""
    if len(directions) not in (1, 2):
        raise ValueError(f"Invalid directions: {len(directions)}. Must be one or two.")
    for direction in directions:
        shapes = [list(d.shape) for d in direction]
        if shapes != [list(p.shape) for p in params]:
            raise ValueError(
                "Invalid direction. Must hold a tensor for each parameter, of its shape and in their order."
            )
    return [flat(direction).to(params[0].device) for direction in directions]
