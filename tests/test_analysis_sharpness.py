"""m-sharpness: against closed forms, the float64 reference and the optimizer's own gap; what it leaves untouched."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysis_subjects import Loss, Mishap, Params, Restless, data_of, everything, restless
from helpers import DTYPES, FEW_SIZES, FLOAT64_RTOL, assert_same_bits, bits, ids, small_net, snapshot
from torch import Tensor, nn

from fused_sam import FusedSAM, reference
from fused_sam.analysis import sharpness

P_NORMS = [1.0, 1.5, 2.0, 3.0, 70.0, math.inf]
RHO, ETA = 0.07, 0.013


def climb(
    w: list[Tensor], gradient: Callable[[list[Tensor]], list[Tensor]], adaptive: list[bool], **options: Any
) -> list[list[Tensor]]:
    """w + epsilon_k for k = 1, 2, ... by the formulas, with the scaling of w throughout."""
    rho, p, alpha = options["rho"], options["p"], options["alpha"]
    scales = [reference.scaling(x, a, options["eta"]) for x, a in zip(w, adaptive, strict=True)]
    e, visited = [torch.zeros_like(x) for x in w], []
    for _ in range(options["steps"]):
        g = gradient([x + y for x, y in zip(w, e, strict=True)])
        up = reference.direction([t * x for t, x in zip(scales, g, strict=True)], p)
        e = [x + alpha * t * d for x, t, d in zip(e, scales, up, strict=True)]
        flat = torch.cat([(x / t).flatten() for x, t in zip(e, scales, strict=True)])
        if p == math.inf:
            e = [t * (x / t).clamp(-rho, rho) for x, t in zip(e, scales, strict=True)]
        else:
            factor = min(1.0, rho / float(torch.linalg.vector_norm(flat, ord=p)))
            e = [factor * x for x in e]
        visited.append([x + y for x, y in zip(w, e, strict=True)])
    return visited


def expected_sharpness(net: nn.Module, groups: list[tuple[Tensor, Tensor]], flags: list[bool], **options: Any) -> float:
    """The mean over groups, weighted by their examples, of the highest loss on the way up less that at w."""
    names = [name for name, _ in net.named_parameters()]
    w = [p.detach().clone() for p in net.parameters()]
    total = 0.0
    for x, y in groups:

        def loss(weights: list[Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,)), y)

        def gradient(weights: list[Tensor], loss: Any = loss) -> list[Tensor]:
            leaves = [v.requires_grad_() for v in weights]
            return list(torch.autograd.grad(loss(leaves), leaves))

        visited = climb(w, gradient, flags, **options)
        total += len(y) * (max(float(loss(v)) for v in visited) - float(loss(w)))
    return total / sum(len(y) for _, y in groups)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("adaptive", [False, True, "weights"])
@pytest.mark.parametrize("p", P_NORMS)
def test_it_is_the_formula(p: float, adaptive: bool | str, steps: int) -> None:
    net, data = small_net(), data_of([7, 5])
    w = snapshot(net.parameters())
    flags = [adaptive is True or (adaptive == "weights" and q.dim() > 1) for q in net.parameters()]
    rho = 0.02 if p > 3 else 0.2
    alpha = rho if steps == 1 else 0.4 * rho
    options = {"rho": rho, "p": p, "eta": ETA, "steps": steps}
    groups = [(x[i : i + 3], y[i : i + 3]) for x, y in data for i in range(0, len(y), 3)]
    measured = sharpness(
        net, F.cross_entropy, data, m=3, adaptive=adaptive, step_size=None if steps == 1 else alpha, **options
    )
    expected = expected_sharpness(net, groups, flags, alpha=alpha, **options)
    # A difference of two losses of about 1.4 each; the powers of general p lose the digits that docs/numerics.md says.
    assert measured.sharpness == pytest.approx(expected, abs=100 * FLOAT64_RTOL)
    assert expected > 1e-4
    assert (measured.groups, measured.examples) == (5, 12)
    whole = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    assert measured.loss == pytest.approx(F.cross_entropy(net(whole[0]), whole[1]).item(), rel=FLOAT64_RTOL)
    assert_same_bits(net.parameters(), w)


@pytest.mark.parametrize(
    ("steps", "length", "dtype"),
    [(1, 0.6, torch.float32), (1, 3.0, torch.float64), (7, 0.6, torch.float64), (3, 3.0, torch.float32)],
)
@pytest.mark.parametrize("p", [*P_NORMS, 500.0])  # 0.07^500 is no fp64 number
def test_a_linear_loss_rises_by_rho_times_its_dual_norm(
    p: float, steps: int, length: float, dtype: torch.dtype, backend: str, device: str
) -> None:
    """max over ||e||_p <= rho of <a, e> is rho ||a||_q, and every projection has to stay there."""
    net = Params(FEW_SIZES[:-1], dtype, device)
    slopes = [torch.randn(n, dtype=torch.float64, device=device) for n in FEW_SIZES[:-1]]
    examples = torch.zeros(3, 1, device=device)

    def loss_fn(weights: list[Tensor], y: Tensor) -> Tensor:
        return torch.stack([(a * w.double()).sum() for a, w in zip(slopes, weights, strict=True)]).sum()

    found = sharpness(
        net, loss_fn, (examples, examples), rho=RHO, p=p, steps=steps, step_size=length * RHO, backend=backend
    )
    reached = min(1.0, steps * length) * RHO
    expected = reached * float(reference.dual_norm(slopes, p))
    assert found.sharpness == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-9)


def test_more_steps_come_closer_to_the_true_maximum() -> None:
    """A convex quadratic: its maximum over a 2-ball is on the sphere, where (s I - A) e = A w for one s > lambda_1."""
    net = Params([6])
    with torch.no_grad():
        net.weights[0].copy_(torch.tensor([0.5, -0.7, 0.9, -1.1, 1.3, -1.5]))
    curvature = torch.diag(torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64))

    def loss_fn(weights: list[Tensor], y: Tensor) -> Tensor:
        return weights[0] @ curvature @ weights[0] / 2

    rho, examples = 1.5, torch.zeros(1, 1)
    w = net.weights[0].detach()
    low, high = 9.0, 1e4  # the length of e falls with s
    for _ in range(200):
        s = (low + high) / 2
        e = torch.linalg.solve(s * torch.eye(6, dtype=torch.float64) - curvature, curvature @ w)
        low, high = (s, high) if torch.linalg.vector_norm(e) > rho else (low, s)
    best = float(loss_fn([w + e], w) - loss_fn([w], w))
    rises = [sharpness(net, loss_fn, (examples, examples), rho=rho, steps=k).sharpness for k in (1, 3, 100)]
    assert rises[0] < rises[1] <= best * (1 + 1e-9)
    assert rises[2] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_one_step_is_the_gap_that_the_optimizer_sees(
    dtype: torch.dtype, adaptive: bool, backend: str, device: str
) -> None:
    """Bit for bit: the same ops at the same place."""
    net = small_net(dtype, device)
    (x, y) = data_of([8], dtype, device)[0]
    options = {"rho": RHO, "adaptive": adaptive, "eta": ETA, "backend": backend}
    optimizer = FusedSAM(net.parameters(), lr=0.13, **options)

    def closure() -> Tensor:
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with torch.backends.cudnn.flags(deterministic=True):
        found = sharpness(net, F.cross_entropy, [(x, y)], m=8, **options)
        optimizer.step(closure)
    assert found.loss == float(optimizer.last.loss)
    assert found.sharpness == float(optimizer.last.loss_perturbed.double() - optimizer.last.loss.double())
    assert dtype in (torch.bfloat16, torch.float16) or found.sharpness > 0


@pytest.mark.parametrize(("m", "steps"), [(3, 1), (3, 3), (None, 1), (None, 3)])
def test_it_leaves_no_trace_whatever_happens(m: int | None, steps: int) -> None:
    """In whichever call of the loss it fails, or in none."""
    net, data = restless()
    before, calls = everything(net), (3 if m else 2) * (steps + 1)
    for failing_call in (*range(1, calls + 1), None):
        loss_fn, seen = Loss(failing_call), set()

        def recorded(output: Tensor, y: Tensor, loss_fn: Loss = loss_fn, seen: set[bytes] = seen) -> Tensor:
            seen.add(bits(net.first.weight))
            return loss_fn(output, y)

        with pytest.raises(Mishap) if failing_call else contextlib.nullcontext():
            sharpness(net, recorded, data, rho=RHO, m=m, steps=steps)
        assert everything(net) == before
    assert loss_fn.calls == calls
    assert len(seen) == 1 + (3 if m else 1) * steps


def test_dropout_masks_are_those_of_the_first_pass_unless_asked_otherwise() -> None:
    net, data = Restless(), data_of([6, 6], torch.float32)
    assert sharpness(net, F.cross_entropy, data, rho=0.0, m=3).sharpness == 0.0
    assert sharpness(net, F.cross_entropy, data, rho=0.0, m=None, steps=3).sharpness == 0.0
    state = torch.get_rng_state()
    assert sharpness(net, F.cross_entropy, data, rho=0.0, m=3, replay_rng=False).sharpness != 0.0
    assert not torch.equal(state, torch.get_rng_state())


def test_groups_of_all_examples_are_one_group_across_batches() -> None:
    """The same epsilon for all: cutting the same examples into other batches changes nothing."""
    net, (x, y) = small_net(), data_of([11])[0]
    whole = sharpness(net, F.cross_entropy, (x, y), rho=RHO, steps=3)
    pieces = [(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 4), (4, 9), (9, 11))]  # an empty one among them
    cut = sharpness(net, F.cross_entropy, pieces, rho=RHO, steps=3)
    assert (whole.groups, whole.examples) == (cut.groups, cut.examples) == (1, 11)
    assert cut.sharpness == pytest.approx(whole.sharpness, rel=1e-10)
    assert sharpness(net, F.cross_entropy, pieces, rho=RHO, m=2).sharpness > whole.sharpness


def test_a_shuffled_loader_and_nested_examples_count_as_they_are() -> None:
    """As one group the order does not matter, though the loader draws another in every pass."""
    net, (x, y) = small_net(torch.float32), data_of([10], torch.float32)[0]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.net(batch["images"])

    examples = [({"images": a, "note": "kept"}, (b,)) for a, b in zip(x, y, strict=True)]
    loader = torch.utils.data.DataLoader(examples, batch_size=4, shuffle=True)
    found = sharpness(Named(), lambda out, y: F.cross_entropy(out, y[0]), loader, rho=RHO)
    assert found.sharpness == pytest.approx(sharpness(net, F.cross_entropy, (x, y), rho=RHO).sharpness, rel=1e-4)
    assert sharpness(Named(), lambda out, y: F.cross_entropy(out, y[0]), loader, rho=RHO, m=2).groups == 5


def test_only_the_parameters_given_move_and_frozen_ones_stay() -> None:
    net, data = small_net(), data_of([6])
    chosen = [net[3].weight, net[3].bias]
    flags = [q is chosen[0] or q is chosen[1] for q in net.parameters()]
    twin = copy.deepcopy(net)
    for q, flag in zip(twin.parameters(), flags, strict=True):
        q.requires_grad_(flag)
    found = sharpness(net, F.cross_entropy, data, rho=RHO, params=chosen)
    assert found == sharpness(twin, F.cross_entropy, data, rho=RHO)
    assert 0 < found.sharpness < sharpness(net, F.cross_entropy, data, rho=RHO).sharpness


def test_unused_parameters_and_weights_of_zero_stay_where_they_are() -> None:
    """A weight of 0 has no neighbourhood of its own without eta."""
    net = Params([3, 5])
    with torch.no_grad():
        net.weights[0][1] = 0.0
    slope = torch.tensor([1.0, 100.0, -2.0], dtype=torch.float64)
    examples = torch.zeros(2, 1)
    found = sharpness(net, lambda out, y: (slope * out[0]).sum(), (examples, examples), rho=RHO, adaptive=True, steps=5)
    expected = RHO * float(torch.linalg.vector_norm(slope * net.weights[0].detach()))
    assert found.sharpness == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("where", ["at w", "beyond"])
def test_a_loss_that_is_not_a_number_shows(where: str) -> None:
    net, calls = small_net(), 0

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(output, y)
        return loss * math.nan if calls == (1 if where == "at w" else 2) else loss

    w = snapshot(net.parameters())
    assert math.isnan(sharpness(net, loss_fn, data_of([6]), rho=RHO, steps=3).sharpness)
    assert_same_bits(net.parameters(), w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"rho=-0\.1.*>= 0"),
        ({"rho": math.nan}, r"rho=nan"),
        ({"p": 0.5}, r"p=0\.5.*>= 1"),
        ({"adaptive": "biases"}, r"adaptive='biases'"),
        ({"eta": -1.0}, r"eta=-1\.0"),
        ({"m": 0}, r"m=0.*>= 1"),
        ({"m": 7}, r"m=7.*first has 6 examples"),
        ({"m": 2.0}, r"m=2\.0"),
        ({"steps": 0}, r"steps=0"),
        ({"step_size": 0.0}, r"step_size=0\.0.*> 0"),
        ({"params": []}, r"params=\[\]"),
        ({"backend": "cudnn"}, r"cudnn"),
        ({"data": []}, r"without examples"),
        ({"data": [(torch.zeros(0, 3, 4, 4), torch.zeros(0))]}, r"without examples"),
        ({"data": [torch.zeros(2, 3)]}, r"batch of type Tensor"),
        ({"data": [(torch.zeros(2, 3), torch.zeros(3))]}, r"\[2, 3\] examples"),
        ({"data": iter([])}, r"list_iterator.*once only"),
        ({"data": 3}, r"data of type int"),
        ({"data": torch.utils.data.TensorDataset(torch.zeros(2, 3))}, r"TensorDataset.*DataLoader around it"),
        ({"params": lambda net: [net[0].weight, net[0].weight]}, "duplicates"),
        ({"params": lambda net: [net[0].weight.detach()]}, r"params\[0\]"),
        ({"params": lambda net: [net[0].weight, net[0].weight * 2]}, r"params\[1\]"),
        ({"loss_fn": lambda out, y: out}, r"loss of shape \[6, 4\]"),
        ({"loss_fn": lambda out, y: 1.0}, r"loss of type float"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_bad_input_is_refused_with_the_value_and_the_rule(options: dict[str, Any], message: str) -> None:
    net = small_net()
    w = snapshot(net.parameters())
    arguments = {"loss_fn": F.cross_entropy, "data": data_of([6, 6])} | options
    if callable(params := arguments.get("params")):
        arguments["params"] = params(net)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as refusal:
        sharpness(net, **arguments)
    assert "\n" not in str(refusal.value)
    assert_same_bits(net.parameters(), w)
