"""What the tests share: tolerances, awkward tensors, options away from their neutral values, small networks."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam import ReferenceSAM, ops
from fused_sam.ops import AdamGroup, AscentGroup, SGDGroup

# Tolerances, all of them. Counted in ulps of the dtype at the largest operand of the sum that produced a
# value: w, w' and e for the ascent, w, w' and the terms of lr * d for the update. Cancellation makes any
# bound at the result alone unattainable.
PERTURB_ULP = 3.0  # scale, product and sum: three roundings
UPDATE_ULP = 6.0  # weight decay, dampening, momentum, Nesterov, learning rate, sum
# Adam's averages: weight decay, difference and fused multiply-add; decay, two products of g and fused multiply-add.
AVERAGE_ULP = 4.0
# Of lr * m / (sqrt(v) + eps), mostly half an ulp each: m, v (halved by the root), root, correction, division, eps, step
# size, product, division, sum. torch.optim.Adam itself comes within 3.1.
ADAM_ULP = 6.0
ROOT_ULP = 3.0  # between a step with torch's root and one with ours: two of the quotient, one of the sum
MOMENTUM_ULP = 2.0  # further ulps for each step before: a momentum buffer carries its rounding along
# The factor of a clipped gradient: the scale and its reciprocal, each rounded to fp32, in every dtype.
CLIP_RTOL = 2 * 2.0**-24 + 1e-9
# 16-bit data is computed in fp32 and rounded once on storing, so half an ulp is all that may be lost, up to
# ties that the fp32 rounding decides the other way.
ROUNDED_ONCE_ULP = 0.5 + 2.0**-6
# fp64 accumulation of fp32 or narrower data; fp64 data loses the rounding of its own squares and sums.
NORM_RTOL = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7, torch.float64: 1e-13}
# rho against the measured length of a displacement: one rounding per element, and rho / ||g|| rounded once.
LENGTH_RTOL = {torch.float32: 4e-7, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# A 16-bit trajectory may be this many times as far from float64 as torch's own for-loop is, plus one ulp.
LOW_PRECISION_FACTOR = 2.0
# Ten steps of ours against torch's on a CPU where torch fuses no multiply-add and so rounds every product, in units of
# the rounding of the dtype they are computed in: four times the worst seen.
UNFUSED_EPS = 32
# float64 networks against float64 oracles over some ten steps: rounding of 1e-16, amplified by the network.
FLOAT64_RTOL = 1e-11

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
BLOCK = 16384  # elements the CPU kernels claim at a time
# Every size up to two vectors of every dtype, a prime, and the edges of one and two blocks.
SIZES = [*range(131), 1009, *(BLOCK * k + d for k in (1, 2) for d in (-1, 0, 1))]
FEW_SIZES = [0, 1, 3, 16, 67, 129, 1009, BLOCK + 1]
if os.environ.get("TRITON_INTERPRET") == "1":
    # A program costs milliseconds there: the edges alone, with those of its own chunks.
    SIZES = [*range(5), *(2**k + d for k in (4, 5, 7) for d in (-1, 0, 1)), 1009, 1025, 8191, 8193, BLOCK + 1]
elif "PTX_EMULATOR" in os.environ and "FUSED_SAM_PTX_LONG" not in os.environ:
    # An element costs a microsecond there: the edges of warps, units and Triton's chunks, for CPU blocks mean nothing.
    SIZES = [*range(67), *(2**k + d for k in (7, 8, 10) for d in (-1, 0, 1)), 4099, 8193]
    FEW_SIZES = [0, 1, 3, 16, 67, 129, 1009, 4099]
# Beyond the size, in every dtype, up to which the native backend keeps w in memory of its own rather than in that of
# the gradient, and beyond one thread's work.
LARGE = 181 * 182

# Seconds after which a process or thread that hangs is given up; work that goes on takes far less on any machine.
PATIENCE = 900

# No hyperparameter at a value where two formulas coincide.
HYPER = {"lr": 0.13, "momentum": 0.87, "weight_decay": 0.017}
RHO = 0.07
SGD_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.13},
    "decay": {"lr": 0.13, "weight_decay": 0.017},
    "momentum": {"lr": 0.13, "momentum": 0.87},
    "dampening": {"lr": 0.13, "momentum": 0.87, "dampening": 0.3},
    "nesterov": {"lr": 0.13, "momentum": 0.87, "nesterov": True},
    "momentum-decay": {"lr": 0.13, "momentum": 0.87, "dampening": 0.3, "weight_decay": 0.017},
    "nesterov-decay": {"lr": 0.13, "momentum": 0.87, "nesterov": True, "weight_decay": 0.017},
    "maximize": {"lr": 0.13, "maximize": True},
    "maximize-all": {"lr": 0.13, "momentum": 0.87, "dampening": 0.3, "weight_decay": 0.017, "maximize": True},
    "maximize-nesterov": {
        "lr": 0.13,
        "momentum": 0.87,
        "nesterov": True,
        "weight_decay": 0.017,
        "maximize": True,
    },
}


ADAM_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.013},
    "betas": {"lr": 0.013, "betas": (0.3, 0.71), "eps": 0.013},
    "decay": {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17},
    "decoupled": {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17, "decoupled": True},
    "amsgrad": {"lr": 0.013, "betas": (0.8, 0.97), "amsgrad": True},
    "maximize": {"lr": 0.013, "betas": (0.8, 0.97), "maximize": True},
    "all": {
        "lr": 0.013,
        "betas": (0.8, 0.97),
        "eps": 1e-5,
        "weight_decay": 0.17,
        "amsgrad": True,
        "maximize": True,
    },
    "all-decoupled": {
        "lr": 0.013,
        "betas": (0.8, 0.97),
        "eps": 1e-5,
        "weight_decay": 0.17,
        "amsgrad": True,
        "maximize": True,
        "decoupled": True,
    },
}


def ids(value: object) -> str | None:
    """Readable parametrisation names for dtypes."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def bits(tensor: Tensor) -> bytes:
    """The values as bytes in index order: tells -0.0 from 0.0, and NaN equals itself."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor.resolve_neg()
    # Not contiguous(), which leaves a single element any stride.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor | bytes], what: str = "tensor") -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert bits(a) == (e if isinstance(e, bytes) else bits(e)), f"{what} {i} differs"


@functools.cache
def torch_fuses() -> bool:
    """Whether torch rounds a product and a sum once on this CPU, as its kernels do from AVX2 on."""
    x = 1 + 2.0**-12  # whose square is as near to the fp32 number below it as to the one above
    return bool(torch.full((64,), -(1 + 2.0**-11)).add_(torch.full((64,), x), alpha=x).any())


def assert_bits_of_torch(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "tensor") -> None:
    """The bits of torch's for-loops; on a CPU where torch does not fuse multiply-adds, which ours do, close to them."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.is_cuda or torch_fuses():
            assert_same_bits([a], [e], f"{what} {i}")
        else:
            eps = torch.finfo(a.dtype).eps
            rounding = UNFUSED_EPS * min(eps, torch.finfo(torch.float32).eps) + (eps if a.dtype in SIXTEEN_BIT else 0)
            torch.testing.assert_close(a, e, rtol=rounding, atol=rounding, msg=f"{what} {i} is not close")


def assert_as_torch(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "tensor") -> None:
    """The bits of torch.optim.Adam with `ieee_roots`; on a GPU torch multiplies by reciprocals instead of dividing."""
    for a, e in zip(actual, expected, strict=True):
        if a.is_cuda:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, msg=what)
        else:
            assert_bits_of_torch([a], [e], what)


def assert_all_close(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Float64 tensors within FLOAT64_RTOL of each other, pair by pair."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


def snapshot(tensors: Iterable[Tensor]) -> list[bytes]:
    return [bits(t) for t in tensors]


class Carved:
    """Tensors cut from one buffer at odd offsets: misaligned, and with neighbours that must not change."""

    FILL = 42.0

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: str) -> None:
        self.buffer = torch.full((sum(sizes) + 2 * len(sizes) + 1,), self.FILL, dtype=dtype, device=device)
        self.gaps = torch.ones_like(self.buffer, dtype=torch.bool)
        self.tensors = []
        offset = 1
        for size in sizes:
            self.tensors.append(self.buffer[offset : offset + size])
            self.gaps[offset : offset + size] = False
            offset += size + (1 if size % 2 else 2)

    def check(self) -> None:
        assert bool((self.buffer[self.gaps] == self.FILL).all()), "an element outside the tensors was written"


class Lists:
    """What sgd_update takes, of the given sizes with random contents."""

    STATES = 1

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: str) -> None:
        self.carved = [Carved(sizes, dtype, device) for _ in range(3 + self.STATES)]
        self.params, self.grads, self.backups, *self.states = (c.tensors for c in self.carved)
        self.momentum = self.states[0]
        for tensors in (self.params, self.grads, self.backups, self.momentum):
            for x in tensors:
                x.copy_(torch.randn(x.shape))

    def update(self, groups: list[Any], backups: bool = True, **options: Any) -> None:
        nothing = [None] * len(self.params)
        ops.sgd_update(self.params, self.grads, self.backups if backups else nothing, self.momentum, groups, **options)

    def copy_(self, other: Lists) -> None:
        for mine, theirs in zip(self.carved, other.carved, strict=True):
            mine.buffer.copy_(theirs.buffer)

    def check_neighbours(self) -> None:
        for carved in self.carved:
            carved.check()


class AdamLists(Lists):
    """What adam_update takes. ``steps`` are those done before."""

    STATES = 3

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: str, steps: float = 6.0) -> None:
        super().__init__(sizes, dtype, device)
        self.steps = [torch.tensor(steps) for _ in sizes]
        for tensors in self.states[1:]:
            for x in tensors:
                x.copy_(torch.rand(x.shape) + 0.01)

    def update(self, groups: list[Any], backups: bool = True, **options: Any) -> None:
        nothing = [None] * len(self.params)
        lists = self.params, self.grads, self.backups if backups else nothing, *self.states, self.steps
        ops.adam_update(*lists, groups, **options)


def strided_pairs(dtype: torch.dtype, device: str) -> list[tuple[str, Tensor, Tensor]]:
    """(name, param, grad) in the layouts that kernels over flat memory get wrong: strides differ."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device=device, dtype=dtype)

    cases = [
        ("column slice", random(37, 5)[:, 2], random(37)),
        ("row-strided block", random(12, 11)[::3, 2:9], random(4, 7)),
        ("transposed", random(7, 19).t(), random(19, 7)),
        ("transposed gradient", random(19, 7), random(7, 19).t()),
        (
            "channels_last, row-major gradient",
            random(3, 5, 4, 6).to(memory_format=torch.channels_last),
            random(3, 5, 4, 6),
        ),
        (
            "row-major, channels_last gradient",
            random(3, 5, 4, 6),
            random(3, 5, 4, 6).to(memory_format=torch.channels_last),
        ),
        (
            "both channels_last",
            random(3, 5, 4, 6).to(memory_format=torch.channels_last),
            random(3, 5, 4, 6).to(memory_format=torch.channels_last),
        ),
        ("size-1 dimensions", random(1, 33, 1).transpose(0, 2), random(1, 33, 1)),
        ("expanded gradient", random(6, 9), random(6, 1).expand(6, 9)),
        ("scalar expanded gradient", random(41), random(1).expand(41)),
        ("strided gradient", random(23), random(46)[::2]),
        ("zero-dimensional", random(1)[0], random(1)[0]),
    ]
    if dtype in (torch.float32, torch.float64):
        # Negated on reading, by a bit that only torch knows of.
        cases.append(("lazily negated gradient", random(23), torch.view_as_complex(random(23, 2)).conj().imag))
    return cases


def gradient_stream(
    shapes: Sequence[Sequence[int]], steps: int, dtype: torch.dtype, scale: float = 1.0
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Random gradients for both passes of every step, the same for whoever replays them."""
    return [
        (
            [(torch.randn(tuple(s)) * scale).to(dtype) for s in shapes],
            [(torch.randn(tuple(s)) * scale).to(dtype) for s in shapes],
        )
        for _ in range(steps)
    ]


def set_grads(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """p.grad = a private copy in the parameter's dtype and device."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(device=p.device, dtype=p.dtype, copy=True)


def two_calls(optimizer: Any, params: list[Tensor], first: list[Any], second: list[Any]) -> None:
    """A step with the gradients given for both passes."""
    set_grads(params, first)
    optimizer.first_step(zero_grad=True)
    set_grads(params, second)
    optimizer.second_step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The state of every parameter that has any, in the order of the groups and of its names."""
    entries = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    return [v for entry in entries for _, v in sorted(entry.items()) if isinstance(v, Tensor)]


def ascent_groups(count: int, rho: float = RHO, adaptive: bool = False) -> list[AscentGroup]:
    return [AscentGroup(size=count, rho=rho, adaptive=adaptive)]


def sgd_groups(count: int, first: bool = False, **config: Any) -> list[SGDGroup]:
    neutral = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    return [SGDGroup(size=count, first=first, **(neutral | config))]


def adam_groups(count: int, first: bool = False, **config: Any) -> list[AdamGroup]:
    neutral = {"eps": 1e-8, "weight_decay": 0.0, "decoupled": False, "amsgrad": False, "maximize": False}
    beta1, beta2 = config.pop("betas", (0.9, 0.999))
    return [AdamGroup(size=count, beta1=beta1, beta2=beta2, first=first, **(neutral | config))]


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def small_net(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    """A convolution in channels_last, two linear layers, smooth activations."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 4))
    return net.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def batches(count: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(6, 3, 4, 4).to(device=device, dtype=dtype), torch.randint(4, (6,)).to(device))
        for _ in range(count)
    ]


def closure_for(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """A closure that does not zero the gradients itself."""

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def zeroing(net: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure as ReferenceSAM and torch.optim want it: it zeroes the gradients first."""

    def zeroed() -> Tensor:
        net.zero_grad()
        return closure()

    return zeroed


def momentum_of(optimizer: torch.optim.Optimizer | ReferenceSAM, param: Tensor) -> Tensor | None:
    if isinstance(optimizer, ReferenceSAM):
        return optimizer.momentum_buffers.get(param)
    return optimizer.state[param].get("momentum_buffer") if param in optimizer.state else None


def buffers(optimizer: torch.optim.Optimizer | ReferenceSAM) -> list[Tensor | None]:
    """The momentum buffer of every parameter, in the order of the groups."""
    return [momentum_of(optimizer, p) for group in optimizer.param_groups for p in group["params"]]


def quadratic(params: list[Tensor]) -> Callable[[], Tensor]:
    """A closure whose gradient is 3 w: known, and not to be mistaken for w."""

    def closure() -> Tensor:
        loss = sum(1.5 * (p * p).sum() for p in params)
        loss.backward()
        return loss

    return closure


def leaves(*sizes: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(n, device=device, dtype=dtype).requires_grad_() for n in sizes]


def lacks_isa(isa: str) -> bool:
    """Whether this machine cannot run an instruction set."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    needed = {"avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"], "avx2": ["avx2", "fma", "f16c"]}
    return any(flag not in flags for flag in needed.get(isa, []))
