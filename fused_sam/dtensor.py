"""Parameters that are DTensors: of ``fully_shard`` (FSDP2), of tensor parallelism, or of both.

A rank computes with what it has of each tensor; the norm is that of all shards. The gradients of both passes come
averaged from whatever made the DTensors, so that all ranks share one perturbation.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.interface import TensorList
from fused_sam.options import DTENSORS, Options, refuse
from fused_sam.parameters import Parameters
from fused_sam.peers import Peers, any_of, gathered

# A mesh, and those of its dimensions along which a tensor is cut.
Sharding: TypeAlias = tuple[Any, tuple[int, ...]]


def is_sharded(x: Any) -> bool:
    """Return whether it is a DTensor. Importing them takes most of a second: where no code has, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_parts(tensors: TensorList) -> TensorList:
    """Return what this rank has of each tensor: the same object in every call."""
    return [_local(x) if is_sharded(x) else x for x in tensors]


def _local(x: Any) -> Tensor:
    # to_local() makes a new tensor of a parameter each time, by which a journal would not know it again.
    part = x._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # of a collective that may still run


class Shards(Peers):
    """Some of the parameters are DTensors. The others are taken to be the same on all ranks."""

    def require_supported(self, options: Options) -> None:
        refuse(options, DTENSORS)

    def place_grads(self, parameters: Parameters) -> None:
        _place_grads(parameters.tensors())

    average_first = average_second = place_grads

    def norm(self, ascent: ops.Ascent, tensors: list[Tensor]) -> Tensor | None:
        """Gather the norms of all ranks, one fp64 number each."""
        if ascent.q == 1:
            return None
        members: dict[Sharding, set[int]] = {}
        for i, p in enumerate(tensors):
            members.setdefault(_sharding(p), set()).add(i)
        norms, far = [], ops.holds_fp64(tensors)
        for (mesh, dims), index in members.items():
            norm: Any = (ascent if len(members) == 1 else ascent.of(index)).norm()
            norms.append(_gathered(_owned(norm), mesh, dims, ascent.q, far))
        if not norms:
            return ascent.norm()
        there = [n.to(norms[0].device) for n in norms]
        joint = norms[0] if len(norms) == 1 else ops.joint_norm(there, ascent.q, far)
        if joint.dim() == 0:
            return joint
        mine = joint[3] == dist.get_rank()
        return torch.stack([joint[0], torch.where(mine, joint[1], -1.0), joint[2]])

    def any_overflow(self, found_inf: Tensor | None, parameters: Parameters) -> Tensor | None:
        params = [p for p in parameters.tensors() if is_sharded(p)]
        flag: Any = found_inf.full_tensor() if is_sharded(found_inf) else found_inf  # type: ignore[union-attr]
        for mesh in dict.fromkeys(p.device_mesh for p in params):  # type: ignore[attr-defined]
            for dim in range(mesh.ndim):
                flag = any_of(flag, params[0].device, mesh.get_group(dim))
        return flag


def _place_grads(params: list[Tensor]) -> None:
    """Place gradients as their parameters: of a replicated one, backward may leave a sum still to be made."""
    for p in params:
        if is_sharded(p) and p.grad is not None and p.grad.placements != p.placements:  # type: ignore[attr-defined]
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]


def _sharding(p: Any) -> Sharding:
    if not is_sharded(p):
        return None, ()
    return p.device_mesh, tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())


def _owned(norm: Tensor) -> Tensor:
    """Return the norm, for p = 1 with the rank that has its element."""
    return norm if norm.dim() == 0 else torch.cat([norm, torch.full_like(norm[:1], dist.get_rank())])


def _gathered(norm: Tensor, mesh: Any, dims: tuple[int, ...], q: float, far: bool) -> Tensor:
    """Return the joint norm of the ranks along some dimensions of a mesh."""
    for dim in dims:
        norm = gathered(norm, mesh.get_group(dim), q, far)
    return norm
