"""The spectrum of a Hessian: its largest eigenvalues, its trace, its density."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sam.analysis.hessian import Hessian
from fused_sam.analysis.lanczos import tridiagonal

GRID_MARGIN = 4.0  # widths beyond the outermost node: all but 6e-5 of its Gaussian
ROUNDING = 1e-5  # of products in fp32, generously
RELATIVE_WIDTH = 0.01  # of the span of the nodes
CHUNK = 1024  # nodes whose Gaussians are held in memory at a time


class Eigenvalues(NamedTuple):
    """Some eigenvalues, the largest first: by value for ``which="LA"``, by magnitude for ``"LM"``.

    Attributes:
        values: fp64, shape [k].
        vectors: the eigenvectors as rows, of length 1, fp64, shape [k, n].
        products: with the Hessian, that they took.
    """

    values: Tensor
    vectors: Tensor
    products: int

    @property
    def ratio(self) -> float | None:
        """Return lambda_1 / lambda_5: how few directions are sharp (Foret et al. 2021, figure 3; Jastrzebski et
        al. 2020); None for k < 5."""
        return float(self.values[0] / self.values[4]) if len(self.values) >= 5 else None


def eigenvalues(
    hessian: Hessian,
    k: int = 5,
    *,
    which: str = "LA",
    tol: float = 1e-4,
    max_products: int = 1000,
    seed: int = 0,
) -> Eigenvalues:
    """Return the k largest eigenvalues, by ARPACK's implicitly restarted Lanczos method (`scipy.sparse.linalg.eigsh`).

    Args:
        hessian: the operator, of more than k weights.
        k: how many, >= 1. lambda_1 / lambda_5 takes 5.
        which: ``"LA"``, algebraically largest, or ``"LM"``, largest in magnitude.
        tol: residual ``||H x - lambda x||`` relative to ``abs(lambda)`` at which one is found, >= 0; 0 is the precision
            of fp64, which products in fp32 do not have. The error of lambda itself is of second order in it.
        max_products: roughly, after which to give up, >= 1.
        seed: of the vector to start from.

    Raises:
        ValueError: for a value out of range.
        RuntimeError: if they are not found within ``max_products``.
        ModuleNotFoundError: without scipy (``pip install '.[analysis]'``).
    """
    if not (isinstance(k, int) and 1 <= k < hessian.size):
        raise ValueError(f"Invalid {k=}. Must be an integer >= 1 and less than the number of weights, {hessian.size}.")
    if which not in ("LA", "LM"):
        raise ValueError(f"Invalid {which=}. Must be 'LA' (algebraically largest) or 'LM' (largest magnitude).")
    if not 0 <= tol < 1:
        raise ValueError(f"Invalid {tol=}. Must be >= 0 and < 1.")
    _require_count("max_products", max_products)
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    before = hessian.products
    kept = min(hessian.size, max(2 * k + 1, 20))
    restarts = max(1, math.ceil((max_products - kept) / max(1, kept - k)))
    start = torch.randn(hessian.size, generator=_generator(seed), dtype=torch.float64).numpy()
    try:
        values, vectors = eigsh(
            hessian.linear_operator(), k=k, which=which, v0=start, ncv=kept, maxiter=restarts, tol=tol
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"{len(error.eigenvalues)} of {k=} eigenvalues found in {hessian.products - before} products. Allow more "
            f"with {max_products=}, or less precision with {tol=}."
        ) from None
    found = torch.from_numpy(values)
    order = (found if which == "LA" else found.abs()).argsort(descending=True)
    return Eigenvalues(found[order], torch.from_numpy(vectors).T[order].contiguous(), hessian.products - before)


class Trace(NamedTuple):
    """An estimate of the trace.

    Attributes:
        trace: the mean over the probes.
        standard_error: of that mean, from the spread of the probes.
        probes: how many there were.
    """

    trace: float
    standard_error: float
    probes: int


def trace(hessian: Hessian, probes: int = 30, *, seed: int = 0) -> Trace:
    r"""Return tr H by Hutchinson's estimator: the mean of :math:`z^\top H z` over z with independent elements +-1.

    One probe is off by a standard deviation of :math:`\sqrt{2 \sum_{i \ne j} H_{ij}^2}`, so a diagonal matrix is exact.

    Args:
        hessian: the operator.
        probes: one product each, >= 2.
        seed: of the z.

    Raises:
        ValueError: for a value out of range.
    """
    _require_count("probes", probes, least=2)
    generator = _generator(seed)
    samples = []
    for _ in range(probes):
        z = (2.0 * torch.randint(0, 2, (hessian.size,), generator=generator) - 1).to(hessian.device, torch.float64)
        samples.append(z @ hessian.hvp(z))
    found = torch.stack(samples)
    return Trace(float(found.mean()), float(found.std() / math.sqrt(probes)), probes)


class Density(NamedTuple):
    """The density of the eigenvalues; its integral is 1.

    Attributes:
        grid: lambda, fp64, shape [points], increasing.
        density: at each of them, per unit of lambda, fp64, shape [points].
        width: standard deviation of the Gaussians that it is the sum of.
        nodes: the Ritz values of all probes, fp64, shape [r].
        weights: the share of the spectrum that each stands for, fp64, shape [r]; they add up to 1.
    """

    grid: Tensor
    density: Tensor
    width: float
    nodes: Tensor
    weights: Tensor


def density(
    hessian: Hessian,
    probes: int = 10,
    *,
    steps: int = 64,
    points: int = 1001,
    width: float | None = None,
    seed: int = 0,
) -> Density:
    r"""Return the eigenvalues' density by stochastic Lanczos quadrature (Ubaru et al. 2017, Ghorbani et al. 2019):

    .. math:: \phi(t) = \frac1n \sum_i \mathcal N(t; \lambda_i, \sigma^2) \approx \frac1{|Z|} \sum_{z \in Z} \sum_j
        \omega_{zj}^2 \, \mathcal N(t; \theta_{zj}, \sigma^2),

    where :math:`\theta_{zj}` are the eigenvalues of the tridiagonal matrix that Lanczos' method makes of H from a
    random z, and :math:`\omega_{zj}` the first components of its eigenvectors. The extreme eigenvalues are found first;
    a share of the spectrum is as uncertain as its mean over the probes.

    Args:
        hessian: the operator.
        probes: how many z, >= 1.
        steps: of Lanczos' method for each, >= 1; at most n are made. One product each, and ``steps`` vectors in memory.
        points: of the grid, >= 2.
        width: sigma, > 0; None for 1 % of the span of the nodes.
        seed: of the z, normally distributed.

    Raises:
        ValueError: for a value out of range.
    """
    for name, value, least in (("probes", probes, 1), ("steps", steps, 1), ("points", points, 2)):
        _require_count(name, value, least)
    if width is not None and not 0 < width < math.inf:
        raise ValueError(f"Invalid {width=}. Must be > 0 and finite.")
    generator = _generator(seed)
    nodes, weights = [], []
    for _ in range(probes):
        start = torch.randn(hessian.size, generator=generator, dtype=torch.float64).to(hessian.device)
        theta, omega = torch.linalg.eigh(tridiagonal(hessian.hvp, start, min(steps, hessian.size)).cpu())
        nodes.append(theta)
        weights.append(omega[0] ** 2 / probes)
    return _smooth(torch.cat(nodes), torch.cat(weights), points, width)


def _smooth(nodes: Tensor, weights: Tensor, points: int, width: float | None) -> Density:
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        # A multiple of the identity has no span but that of rounding.
        width = RELATIVE_WIDTH * (max(high - low, ROUNDING * max(abs(low), abs(high))) or 1.0)
    grid = torch.linspace(low - GRID_MARGIN * width, high + GRID_MARGIN * width, points, dtype=torch.float64)
    values = torch.zeros_like(grid)
    for theta, share in zip(nodes.split(CHUNK), weights.split(CHUNK)):
        values += torch.exp(-(((grid[:, None] - theta) / width) ** 2) / 2) @ share
    return Density(grid, values / (width * math.sqrt(2 * math.pi)), width, nodes, weights)


def _require_count(name: str, value: int, least: int = 1) -> None:
    if not (isinstance(value, int) and value >= least):
        raise ValueError(f"Invalid {name}={value!r}. Must be an integer >= {least}.")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
