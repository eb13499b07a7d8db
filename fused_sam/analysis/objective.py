"""What is analysed: the mean loss over the examples of a data set, as a function of a model's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from fused_sam import batchnorm, rng
from fused_sam.backends.interface import DTYPES

LossFn = Callable[[Any, Any], Tensor]


class Batch(NamedTuple):
    """Examples: what the model takes, what the loss compares with, and how many they are."""

    x: Any
    y: Any
    size: int

    def cut(self, m: int) -> Iterator[Batch]:
        """Yield disjoint groups of m examples in order; the last may be smaller."""
        for start in range(0, self.size, m):
            part = slice(start, min(start + m, self.size))
            x, y = (_map_tensors(functools.partial(_rows, part), side) for side in (self.x, self.y))
            yield Batch(x, y, part.stop - part.start)


class Objective:
    """L(w), the mean of ``loss_fn(model(x), y)`` over the examples of ``data``.

    The model runs in the mode its modules are in; no evaluation changes running statistics or ``p.grad``.

    Args:
        model: called as ``model(x)``.
        loss_fn: called as ``loss_fn(output, y)``; returns the mean over the batch, one number.
        data: batches ``(x, y)`` that can be gone over any number of times, or one pair of tensors, the whole data set.
            Their first dimension counts examples. x and y may be tuples, lists or dicts of tensors.
        params: the weights that L is seen as a function of; None for all that require a gradient.
        replay_rng: start every evaluation from the random state found here, so that L is one function also with dropout
            and shuffled loaders, and leave that state behind.

    Raises:
        TypeError: for data that is not iterable, or only once.
        ValueError: without parameters, or for one that needs no gradient, has a dtype that the ops do not take, or is
            listed twice.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        params: Iterable[Tensor] | None = None,
        replay_rng: bool = True,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.data = as_batches(data)
        self.params = _checked([p for p in model.parameters() if p.requires_grad] if params is None else list(params))
        self.replay_rng = replay_rng
        self._random_state = self.random_state()

    @property
    def device(self) -> torch.device:
        """Return the device of the first parameter, to which batches are moved and where sums are kept."""
        return self.params[0].device

    def random_state(self) -> rng.RNGState | None:
        """Return the generators as they are now; None if they are not to be replayed."""
        return rng.capture({p.device for p in self.params}) if self.replay_rng else None

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Leave statistics and, with ``replay_rng``, generators as they are found."""
        state = self.random_state()
        try:
            with batchnorm.frozen_statistics(self.model):
                yield
        finally:
            if state is not None:
                rng.replay(state)

    def __iter__(self) -> Iterator[Batch]:
        """Yield all examples in batches, on the device of the parameters.

        Raises:
            ValueError: for a batch that is no pair, or whose tensors differ in their number of examples.
        """
        if self._random_state is not None:
            rng.replay(self._random_state)
        for batch in self.data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(f"Invalid batch of type {type(batch).__name__}. Must be a pair (x, y).")
            x, y = (_map_tensors(lambda t: t.to(self.device), side) for side in batch)
            sizes = {t.shape[0] for t in _tensors((x, y)) if t.dim()}
            if len(sizes) != 1:
                raise ValueError(
                    f"Invalid batch of {sorted(sizes)} examples. Tensors must agree in their first dimension."
                )
            size = sizes.pop()
            if size:
                yield Batch(x, y, size)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, shape [].

        Raises:
            ValueError: if ``loss_fn`` does not return one number.
        """
        loss = self.loss_fn(self.model(batch.x), batch.y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"of type {type(loss).__name__}"
            raise ValueError(f"Invalid loss {got}. Must be a tensor of one element, the mean over the batch.")
        return loss.reshape(())

    @torch.no_grad()
    def mean_loss(self) -> Tensor:
        """Return L at the present weights; fp64, shape [], on the device.

        Raises:
            ValueError: for data without examples.
        """
        total, size = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self:
            total += self.loss(batch).to(total) * batch.size
            size += batch.size
        return total / require_examples(size)


def as_batches(data: Any) -> Iterable[Any]:
    """Return ``data`` as an iterable of batches: a pair of tensors is one batch.

    Raises:
        TypeError: as `Objective`.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        return [data]
    rule = "Must be batches (x, y) in a list, a DataLoader or the like, or a pair of tensors"
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(f"Invalid data of type {type(data).__name__}. {rule}: put a DataLoader around it.")
    if isinstance(data, Iterator):
        raise TypeError(f"Invalid data of type {type(data).__name__}, which can be gone over once only. {rule}.")
    if not isinstance(data, Iterable):
        raise TypeError(f"Invalid data of type {type(data).__name__}. {rule}.")
    return data


def require_examples(size: int) -> int:
    """Return the number of examples, or raise if there are none."""
    if size == 0:
        raise ValueError("Invalid data without examples. Must hold at least one.")
    return size


def _checked(params: list[Tensor]) -> list[Tensor]:
    if not params:
        raise ValueError("Invalid params=[]. Must hold at least one tensor that requires a gradient.")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor) or not p.is_leaf or not p.requires_grad or p.dtype not in DTYPES:
            raise ValueError(f"Invalid params[{i}]. Must be a leaf that requires a gradient, of one of {list(DTYPES)}.")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("Invalid params with duplicates. Must hold each tensor once.")
    return params


def _map_tensors(f: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return a nest of tuples, lists and dicts with f applied to every tensor; anything else stays."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {key: _map_tensors(f, value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        values = [_map_tensors(f, value) for value in x]
        return x._make(values) if hasattr(x, "_make") else type(x)(values)
    return x


def _rows(part: slice, x: Tensor) -> Tensor:
    return x[part] if x.dim() else x


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    _map_tensors(keep, x)
    return found


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements as one fp64 vector on the device of the first."""
    return torch.cat([t.detach().to(tensors[0].device, torch.float64).flatten() for t in tensors])


def split(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a vector in the shapes of the parameters, which have as many elements."""
    return [piece.view(p.shape) for piece, p in zip(v.split([p.numel() for p in params]), params)]
