"""Loss landscapes: directions, values at known places, exact restore; and the pictures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysis_subjects import Loss, Mishap, Params, data_of, everything, restless
from helpers import DTYPES, FLOAT64_RTOL, assert_same_bits, ids, small_net, snapshot
from torch import Tensor, nn

from fused_sam import analysis
from fused_sam.analysis import Density, Landscape, difference, landscape, random_direction


@pytest.mark.parametrize("vectors", [False, True])
def test_each_filter_of_a_direction_has_the_length_of_that_of_the_weights(vectors: bool) -> None:
    net = small_net(torch.float32)
    with torch.no_grad():
        net[3].weight[2].zero_()
    direction = random_direction(net.parameters(), seed=5, vectors=vectors)
    for p, d in zip(net.parameters(), direction, strict=True):
        assert d.dtype is torch.float64
        assert d.shape == p.shape
        w = p.detach().double()
        if p.dim() > 1:
            for filter_, of_w in zip(d, w, strict=True):
                assert float(filter_.norm()) == pytest.approx(float(of_w.norm()), rel=1e-12)
        else:
            assert float(d.norm()) == (pytest.approx(float(w.norm()), rel=1e-12) if vectors else 0.0)
    drawn = random_direction(net.parameters(), seed=5, vectors=True, normalise=False)
    for d, r in zip(direction, drawn, strict=True):
        if d.dim() > 1:
            moved = d.flatten(1).norm(dim=1) > 0
            cosines = F.cosine_similarity(d.flatten(1)[moved], r.flatten(1)[moved])
            torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_directions_follow_from_the_seed() -> None:
    params = list(small_net().parameters())
    first = random_direction(params, seed=5)
    assert_same_bits(random_direction(params, seed=5), first)
    other = random_direction(params, seed=6)
    assert not torch.equal(first[0], other[0])
    # The weights do not depend on whether biases are drawn along.
    along = random_direction(params, seed=5, vectors=True)
    assert_same_bits([d for d in along if d.dim() > 1], [d for d in first if d.dim() > 1])


def test_the_surface_is_the_loss_at_each_point() -> None:
    net, data = small_net(), data_of([5, 1, 7])
    x, y = (torch.cat(side) for side in zip(*data, strict=True))
    directions = [random_direction(net.parameters(), seed=i, vectors=True) for i in (1, 2)]
    found = landscape(net, F.cross_entropy, data, directions, [[-0.7, 0.0, 0.3], torch.tensor([0.2, -1.1])])
    assert found.loss.shape == (3, 2)
    assert found.coordinates[0].tolist() == [-0.7, 0.0, 0.3]  # not rounded to fp32
    assert found.loss.dtype is torch.float64
    for i, a in enumerate(found.coordinates[0]):
        for j, b in enumerate(found.coordinates[1]):
            moved = copy.deepcopy(net)
            with torch.no_grad():
                for p, d, e in zip(moved.parameters(), *directions, strict=True):
                    p.add_(a * d + b * e)
                expected = float(F.cross_entropy(moved(x), y))
            assert float(found.loss[i, j]) == pytest.approx(expected, rel=FLOAT64_RTOL)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_zero_is_w_itself_and_the_weights_come_back_bit_for_bit(dtype: torch.dtype, backend: str, device: str) -> None:
    net, data = small_net(dtype, device), data_of([6], dtype, device)
    w, seen = snapshot(net.parameters()), []

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        seen.append(snapshot(net.parameters()))
        return F.cross_entropy(output, y)

    landscape(net, loss_fn, data, [random_direction(net.parameters())], [[-0.5, 0.0, 0.5]], backend=backend)
    assert seen[1] == w
    assert seen[0] != w
    assert seen[2] != w
    assert_same_bits(net.parameters(), w)


def test_the_line_to_another_model_ends_at_its_loss() -> None:
    net, other, data = small_net(torch.float32), small_net(torch.float32), data_of([8], torch.float32)
    found = landscape(net, F.cross_entropy, data, [difference(net, other)], [[0.0, 0.5, 1.0]])
    for place, model in ((0, net), (2, other)):
        assert float(found.loss[place]) == pytest.approx(
            F.cross_entropy(model(data[0][0]), data[0][1]).item(), rel=1e-6
        )
    net[0].weight.requires_grad_(False)
    assert len(difference(net, other)) == 5
    with pytest.raises(ValueError, match=r"other model: 0\.weight has shape None. Must be \[5, 3, 3, 3\]"):
        difference(net, nn.Linear(3, 4))


@pytest.mark.parametrize("failing_call", [None, 1, 4])
def test_it_leaves_no_trace_whatever_happens(failing_call: int | None) -> None:
    net, data = restless()
    before, loss_fn = everything(net), Loss(failing_call)

    def run() -> Landscape:
        return landscape(net, loss_fn, data, [random_direction(net.parameters())], [[0.0, 0.7, 0.0]])

    if failing_call:
        with pytest.raises(Mishap):
            run()
    else:
        loss = run().loss
        assert float(loss[0]) == float(loss[2])  # the same masks at every point
    assert everything(net) == before


def test_what_could_not_be_restored_is_refused_before_it_is_moved() -> None:
    net = Params([3, 4])
    net.weights[1] = nn.Parameter(torch.ones(1, dtype=torch.float64).expand(4))
    w = snapshot(net.parameters())
    direction = random_direction(net.parameters(), vectors=True)
    with pytest.raises(ValueError, match="overlaps itself"):
        landscape(net, lambda out, y: out[0].sum(), (torch.zeros(1, 1), torch.zeros(1, 1)), [direction], [[1.0]])
    assert_same_bits(net.parameters(), w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": []}, r"directions: 0\. Must be one or two"),
        ({"coordinates": [[0.0], [1.0]]}, r"coordinates of shapes \[\[1\], \[1\]\]"),
        ({"coordinates": [[]]}, r"coordinates of shapes \[\[0\]\]"),
        ({"coordinates": [1.0]}, r"coordinates of shapes \[\[\]\]"),
        ({"directions": [[torch.zeros(3)]]}, r"direction\. Must hold a tensor for each parameter"),
        ({"data": []}, r"without examples"),
        ({"params": []}, r"params=\[\]"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_rule(options: dict[str, Any], message: str) -> None:
    net = small_net()
    w = snapshot(net.parameters())
    defaults = {"data": data_of([6]), "directions": [random_direction(net.parameters())], "coordinates": [[0.5]]}
    with pytest.raises(ValueError, match=message) as refusal:
        landscape(net, F.cross_entropy, **(defaults | options))
    assert "\n" not in str(refusal.value)
    assert_same_bits(net.parameters(), w)


def bowl(depth: float, points: int = 5) -> Landscape:
    axis = torch.linspace(-1, 1, points, dtype=torch.float64)
    return Landscape((axis, axis), depth * (axis[:, None] ** 2 + 2 * axis**2))


def line(depth: float) -> Landscape:
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return Landscape((axis,), depth * axis**2)


def spectral(scale: float) -> Density:
    grid = torch.linspace(0, scale, 11, dtype=torch.float64)
    return Density(grid, torch.exp(-grid), 0.1, grid, grid)


def png(figure: Any) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("plot", "make"),
    [
        (analysis.plot_surfaces, bowl),
        (analysis.plot_contours, bowl),
        (analysis.plot_lines, line),
        (analysis.plot_densities, spectral),
    ],
)
def test_pictures_show_each_result_under_its_name(plot: Callable[..., Any], make: Callable[[float], Any]) -> None:
    pytest.importorskip("matplotlib")
    figure = plot({"SGD": make(9.0), "SAM": make(1.0)})
    image = png(figure)
    assert image.startswith(b"\x89PNG")
    texts = [a.get_title() for a in figure.axes] + [
        t.get_text() for a in figure.axes if a.get_legend() for t in a.get_legend().get_texts()
    ]
    assert [t for t in texts if t] == ["SGD", "SAM"]
    assert png(plot({"SGD": make(9.0), "SAM": make(2.0)})) != image


@pytest.mark.parametrize("plot", [analysis.plot_surfaces, analysis.plot_contours])
def test_surfaces_share_a_scale_up_to_the_ceiling(plot: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    exploding = bowl(9.0)
    exploding.loss[0, 0] = math.inf
    exploding.loss[0, 1] = math.nan
    for ceiling, high in ((None, 27.0), (5.0, 5.0)):
        figure = plot({"SGD": exploding, "SAM": bowl(1.0)}, ceiling=ceiling)
        png(figure)
        for axes in figure.axes:
            if hasattr(axes, "get_zlim"):
                assert axes.get_zlim() == pytest.approx((0.0, high))
            else:
                assert axes.collections[0].get_clim() == pytest.approx((0.0, high), rel=0.06)
    png(plot({"flat": bowl(0.0)}))


@pytest.mark.parametrize(
    ("plot", "results", "message"),
    [
        (analysis.plot_surfaces, {"a": line(1.0)}, r"landscape 'a' of 1 directions. Must be of 2"),
        (analysis.plot_lines, {"a": bowl(1.0)}, r"landscape 'a' of 2 directions. Must be of 1"),
        (analysis.plot_contours, {}, r"landscapes=\{\}"),
        (analysis.plot_densities, {}, r"densities=\{\}"),
        (analysis.plot_contours, {"a": bowl(math.nan)}, "without a finite loss"),
    ],
)
def test_results_that_cannot_be_drawn_are_refused(plot: Callable[..., Any], results: Any, message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        plot(results)
