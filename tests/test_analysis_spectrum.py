"""Hessian products, eigenvalues, trace and density: against dense matrices and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysis_subjects import Loss, Mishap, Params, data_of, everything, restless
from helpers import FLOAT64_RTOL, LOW_PRECISION_FACTOR, assert_same_bits, ids, small_net
from torch import Tensor, nn

from fused_sam.analysis import Hessian, density, eigenvalues, trace


def dense(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian of the mean loss by torch.autograd.functional, fp64, shape [n, n]."""
    names = [name for name, _ in net.named_parameters()]
    params = [p.detach().double() for p in net.parameters()]

    def loss(w: Tensor) -> Tensor:
        pieces = [piece.view(p.shape) for piece, p in zip(w.split([p.numel() for p in params]), params, strict=True)]
        output = torch.func.functional_call(net, dict(zip(names, pieces, strict=True)), (x.double(),))
        return F.cross_entropy(output, y)

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in params]))


def product_by_torch(net: nn.Module, data: list[tuple[Tensor, Tensor]], v: Tensor) -> Tensor:
    """H v by torch.autograd.functional, in the dtype of the parameters; the mean over the examples in fp64."""
    names, params = zip(*((name, p.detach()) for name, p in net.named_parameters()))
    along = tuple(x.view_as(p).to(p) for x, p in zip(v.split([p.numel() for p in params]), params, strict=True))
    total = torch.zeros(len(v), dtype=torch.float64)
    for x, y in data:

        def loss(*w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, w, strict=True)), (x,)), y)

        _, pieces = torch.autograd.functional.hvp(loss, params, along)
        total += len(y) * torch.cat([piece.flatten() for piece in pieces]).double()
    return total / sum(len(y) for _, y in data)


def joined(data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def quadratic(curvatures: Tensor) -> Hessian:
    """The Hessian of sum_i c_i w_i^2 / 2, which is diag(c)."""
    net, examples = Params([len(curvatures)]), torch.zeros(1, 1)
    return Hessian(net, lambda out, y: (curvatures * out[0] ** 2).sum() / 2, (examples, examples))


def rotated(curvatures: Tensor) -> tuple[Hessian, Tensor]:
    """A Hessian of these eigenvalues and random eigenvectors, and the same as a matrix."""
    n = len(curvatures)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    matrix = q @ torch.diag(curvatures) @ q.T
    net, examples = Params([n]), torch.zeros(1, 1)
    return Hessian(net, lambda out, y: out[0] @ matrix @ out[0] / 2, (examples, examples)), matrix


def test_a_product_is_that_of_the_dense_matrix_over_batches_of_unequal_size() -> None:
    net, data = small_net(), data_of([5, 1, 7])
    hessian = Hessian(net, F.cross_entropy, data)
    matrix = dense(net, *joined(data))
    assert hessian.size == len(matrix)
    for _ in range(3):
        v = torch.randn(hessian.size, dtype=torch.float64)
        torch.testing.assert_close(hessian.hvp(v), matrix @ v, rtol=0, atol=FLOAT64_RTOL)
    assert hessian.products == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=ids)
def test_products_in_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    net, data = small_net(dtype), data_of([5, 7], dtype)
    twin = small_net()
    twin.load_state_dict(net.state_dict())
    matrix = dense(twin, *joined(data))
    v = torch.randn(len(matrix)).sign()  # exact in every dtype
    exact = matrix @ v.double()
    found = Hessian(net, F.cross_entropy, data).hvp(v)
    assert found.dtype is torch.float64
    error, torchs = (torch.linalg.vector_norm(x - exact) for x in (found, product_by_torch(net, data, v)))
    assert error < LOW_PRECISION_FACTOR * torchs


def test_batches_are_added_up_in_fp64() -> None:
    """So the mean of equal summands is the summand, bit for bit."""
    net, (batch,) = small_net(torch.float32), data_of([5], torch.float32)
    v = torch.randn(Hessian(net, F.cross_entropy, batch).size)
    assert_same_bits(
        [Hessian(net, F.cross_entropy, [batch] * 37).hvp(v)], [Hessian(net, F.cross_entropy, batch).hvp(v)]
    )


def test_a_subset_of_the_parameters_is_a_block_of_the_matrix() -> None:
    net, data = small_net(), data_of([6])
    chosen = [net[3].bias, net[0].weight]
    starts, place = {}, 0
    for p in net.parameters():
        starts[p], place = place, place + p.numel()
    index = torch.cat([torch.arange(starts[p], starts[p] + p.numel()) for p in chosen])
    block = dense(net, *data[0])[index][:, index]
    hessian = Hessian(net, F.cross_entropy, data, params=chosen)
    found = torch.stack([hessian.hvp(v) for v in torch.eye(len(index))])
    torch.testing.assert_close(found, block, rtol=0, atol=FLOAT64_RTOL)


@pytest.mark.parametrize("slope", [1.0, 0.0])
def test_weights_without_curvature_have_rows_of_zeros(slope: float) -> None:
    net, examples = Params([3, 2, 1]), torch.zeros(2, 1)
    v = torch.ones(6)
    linear = Hessian(net, lambda out, y: slope * out[0].sum(), (examples, examples))
    assert linear.hvp(v).tolist() == [0.0] * 6
    partly = Hessian(net, lambda out, y: (out[0] ** 3).sum() + slope * out[1].sum(), (examples, examples))
    assert partly.hvp(v).tolist() == [*(6 * net.weights[0]).tolist(), 0.0, 0.0, 0.0]


@pytest.mark.parametrize("failing", [False, True])
def test_products_leave_no_trace_and_see_the_same_masks(failing: bool) -> None:
    net, data = restless()
    before, loss_fn = everything(net), Loss(2 if failing else None)
    hessian = Hessian(net, loss_fn, data)
    v = torch.randn(hessian.size, generator=torch.Generator().manual_seed(5))
    if failing:
        with pytest.raises(Mishap):
            hessian.hvp(v)
    else:
        first = hessian.hvp(v)
        assert_same_bits([hessian.hvp(v)], [first])
    assert everything(net) == before
    free = Hessian(net, F.cross_entropy, data, replay_rng=False)
    assert not torch.equal(free.hvp(v), free.hvp(v))


@pytest.mark.parametrize("which", ["LA", "LM"])
def test_eigenvalues_are_those_of_the_dense_matrix(which: str) -> None:
    pytest.importorskip("scipy")
    net, data = small_net(), data_of([5, 7])
    matrix = dense(net, *joined(data))
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    if which == "LM":
        exact = exact[exact.abs().argsort(descending=True)]
        assert bool((exact[:6] < 0).any())  # else both would be the same
    hessian = Hessian(net, F.cross_entropy, data)
    found = eigenvalues(hessian, 6, which=which, tol=1e-10)
    torch.testing.assert_close(found.values, exact[:6], rtol=1e-9, atol=0)
    torch.testing.assert_close(matrix @ found.vectors.T, found.vectors.T * found.values, rtol=0, atol=1e-9)
    assert found.ratio == pytest.approx(float(exact[0] / exact[4]), rel=1e-9)
    assert found.products == hessian.products > 6
    rough = eigenvalues(hessian, 2, which=which)
    torch.testing.assert_close(rough.values, exact[:2], rtol=1e-4, atol=0)
    assert rough.ratio is None


def test_the_start_is_random_but_the_same_for_the_same_seed() -> None:
    pytest.importorskip("scipy")
    hessian, _ = rotated(torch.linspace(-3, 8, 29, dtype=torch.float64))
    first, again, other = (eigenvalues(hessian, 3, seed=seed).vectors for seed in (4, 4, 5))
    assert_same_bits([again], [first])
    assert not torch.equal(first.abs(), other.abs())


def test_eigenvalues_that_do_not_converge_say_so_in_one_line() -> None:
    pytest.importorskip("scipy")
    hessian, _ = rotated(torch.cat([torch.ones(200), torch.linspace(1, 1.001, 100)]).double())
    with pytest.raises(RuntimeError, match=r"of k=5 eigenvalues found in \d+ products.*max_products=25") as refusal:
        eigenvalues(hessian, tol=0.0, max_products=25)
    assert "\n" not in str(refusal.value)
    assert hessian.products <= 50


@pytest.mark.parametrize("probes", [2, 7])
def test_the_trace_of_a_diagonal_matrix_is_exact(probes: int) -> None:
    curvatures = torch.tensor([5.0, -3.0, 0.25, 0.0, 17.0], dtype=torch.float64)
    found = trace(quadratic(curvatures), probes)
    assert found == (19.25, 0.0, probes)


def test_the_trace_is_within_its_standard_error_which_is_the_known_one() -> None:
    hessian, matrix = rotated(torch.linspace(-3, 8, 29, dtype=torch.float64))
    probes = 400
    found = trace(hessian, probes, seed=3)
    off_diagonal = matrix - torch.diag(matrix.diagonal())
    expected_error = math.sqrt(2 * float(off_diagonal.square().sum()) / probes)
    assert found.standard_error == pytest.approx(expected_error, rel=0.2)
    assert abs(found.trace - float(matrix.trace())) < 4 * expected_error
    assert found == trace(hessian, probes, seed=3)
    assert found != trace(hessian, probes, seed=4)


def test_the_density_is_that_of_the_eigenvalues() -> None:
    """Two bulks of known shares and an outlier, smoothed alike."""
    spectrum = torch.cat([torch.linspace(-1, 0, 60), torch.linspace(2, 4, 30), torch.tensor([20.0])]).double()
    hessian, _ = rotated(spectrum)
    found = density(hessian, 40, steps=60, width=0.4)
    exact = torch.exp(-(((found.grid[:, None] - spectrum) / 0.4) ** 2) / 2).mean(dim=1) / (0.4 * math.sqrt(2 * math.pi))
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-4)
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    # A share s of n eigenvalues varies by about sqrt(2 s / n) from probe to probe.
    assert float(torch.trapezoid((found.density - exact).abs(), found.grid)) < 0.1
    for low, high, share in ((-1.5, 0.5, 60 / 91), (1.5, 4.5, 30 / 91), (19, 21, 1 / 91)):
        inside = (found.nodes > low) & (found.nodes < high)
        deviation = math.sqrt(2 * share / 91 / 40)
        assert abs(float(found.weights[inside].sum()) - share) < 4 * deviation


def test_the_width_is_a_share_of_the_span_unless_given() -> None:
    hessian, _ = rotated(torch.linspace(-1, 4, 37, dtype=torch.float64))
    found = density(hessian, 2, steps=37, points=11)
    assert found.width == pytest.approx(0.01 * 5, rel=1e-6)
    assert len(found.grid) == len(found.density) == 11
    torch.testing.assert_close(found.grid[[0, -1]], torch.tensor([-1.2, 4.2], dtype=torch.float64), rtol=1e-6, atol=0)


def test_as_many_steps_as_weights_find_every_eigenvalue_once() -> None:
    """No ghosts: without reorthogonalisation the outliers would come back several times."""
    spectrum = torch.cat([torch.linspace(0.1, 2, 40), torch.tensor([50.0, 1000.0])]).double()
    hessian, _ = rotated(spectrum)
    found = density(hessian, 1, steps=100)
    torch.testing.assert_close(found.nodes, spectrum, rtol=1e-8, atol=0)


@pytest.mark.parametrize("value", [0.0, -2.5])
@pytest.mark.parametrize("size", [1, 17])
def test_one_eigenvalue_is_one_node(value: float, size: int) -> None:
    found = density(quadratic(torch.full((size,), value, dtype=torch.float64)), 3, steps=9)
    torch.testing.assert_close(found.nodes, torch.full((3,), value, dtype=torch.float64))
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.hvp(torch.zeros(4)), r"v of shape \[4\].*\[5\]"),
        (lambda h: h.hvp(torch.zeros(5, 1)), r"v of shape \[5, 1\]"),
        (lambda h: eigenvalues(h, 5), r"k=5.*less than the number of weights, 5"),
        (lambda h: eigenvalues(h, 0), r"k=0"),
        (lambda h: eigenvalues(h, 2, which="SA"), r"which='SA'.*'LA'"),
        (lambda h: eigenvalues(h, 2, tol=-1.0), r"tol=-1\.0"),
        (lambda h: eigenvalues(h, 2, max_products=0), r"max_products=0"),
        (lambda h: trace(h, 1), r"probes=1.*>= 2"),
        (lambda h: density(h, 0), r"probes=0"),
        (lambda h: density(h, steps=0), r"steps=0"),
        (lambda h: density(h, points=1), r"points=1"),
        (lambda h: density(h, width=0.0), r"width=0\.0.*> 0"),
        (lambda h: Hessian(small_net(), F.cross_entropy, []).hvp(torch.zeros(319)), "without examples"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_rule(call: Callable[[Hessian], Any], message: str) -> None:
    hessian = quadratic(torch.arange(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=message) as refusal:
        call(hessian)
    assert "\n" not in str(refusal.value)
    assert hessian.products == 0
