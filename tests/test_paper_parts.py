"""What the experiments of bench/paper are made of: methods, configurations, choices and statistics."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
import numpy as np
from scipy import stats

from bench.paper import (
    association,
    defaults,
    m_sharpness,
    pareto,
    rho_grid,
    savings,
    second_order,
    summary,
    training,
    variants,
)
from bench.paper import data as paper_data
from bench.paper.config import Config
from bench.training import data

SMALL = defaults.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 1, "batch_size": 32}
CONFIG = Config(**SMALL, device="cpu")


# methods


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"optimizer": "sgd"}, 1.0),
        ({"optimizer": "adam", "lr": 1e-3}, 1.0),
        ({"optimizer": "sam"}, 2.0),
        ({"optimizer": "sam", "ascent": 0.25}, 1.25),
        ({"optimizer": "sam", "micro_batch": 8}, 2.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "ascent_steps": 3}}, 4.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "second_order": True}}, 3.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "direction": "momentum"}}, 1.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "interval": 3}}, 4 / 3),
    ],
)
def test_passes_are_counted_as_they_are_made(changes, passes):
    config = replace(CONFIG, **changes, epochs=1)
    images = paper_data.split(paper_data.load("digits"), config)
    run = training.Training(config, images)
    examples = 0

    def count(module, args):
        nonlocal examples
        examples += len(args[0])

    run.model.register_forward_pre_hook(count)
    run.train_epoch()
    assert run.passes == pytest.approx(passes)
    forward = passes - 1 if config.options.get("second_order") else passes  # the third pass is backward only
    assert examples == pytest.approx(forward * 96)


def test_cosine_is_that_of_the_whole_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y, rho = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,)), 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = second_order.cosine(model, x, y, rho)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    names, params = zip(*model.named_parameters())

    def loss(ws):
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, ws)), (x,)), y)

    gradient = torch.autograd.grad(loss(params), params, create_graph=True)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    moved = [p + rho * g / norm for p, g in zip(params, gradient)]
    whole = torch.autograd.grad(loss(moved), params, retain_graph=True)
    part = torch.autograd.grad(loss(moved), moved)
    expected = F.cosine_similarity(*(torch.cat([g.flatten() for g in gs]) for gs in (whole, part)), dim=0)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert found < 0.999


# configurations


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"noise_rate": 1.0}, {"ascent": 0.0}, {"micro_batch": 33}, {"noise": "pink"}, {"mixup": -1.0}],
)
def test_a_configuration_that_cannot_be_is_refused(change):
    ((name, _),) = change.items()
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        replace(CONFIG, **change)


def test_the_key_is_of_the_values_that_are_used():
    assert CONFIG.key == Config(**asdict(CONFIG)).key
    assert len({CONFIG.key, replace(CONFIG, seed=1).key, replace(CONFIG, options={"rho": 0.1}).key}) == 3


# choices and statistics


def row(method, epochs, error, *, seconds=1.0, passes=1.0, rho=0.05, noise_rate=0.0, seed=0, unseen=0.0):
    task = replace(CONFIG, epochs=epochs, noise_rate=noise_rate, seed=seed, validation=0.5)
    result = {"test_error": error, "unseen_error": unseen, "seconds": seconds, "passes": passes, "seed": seed}
    about = {"machine": {"cpu": "a", "cores": 2, "isa": "b"}, "versions": {"commit": "c"}, "date": "2026-11-21T10:00"}
    return about | result | {"config": asdict(savings.METHODS[method].configure(task, rho))}


def test_points_are_means_over_seeds():
    rows = [row("SAM", 4, error, seconds=s, passes=8.0, seed=s) for s, error in ((1, 10.0), (2, 13.0))]
    rows.append(row("SGD", 4, 14.0, seconds=0.5, passes=4.0))
    sgd, sam = pareto.points(rows)
    assert (sgd.method, sam.method, sam.epochs) == ("SGD", "SAM", 4)
    assert (sam.error.mean, sam.seconds.mean, sam.passes.mean, sam.error.count) == (11.5, 1.5, 8.0, 2)
    assert sam.error.half == pytest.approx(12.706 * 1.5, rel=1e-4)


@pytest.mark.parametrize("price", ["seconds", "passes"])
def test_front(price):
    def point(name, cost, error):
        prices = {"seconds": 99.0, "passes": 99.0} | {price: cost}
        spread = {key: summary.Interval(value, 0.1, 3) for key, value in (prices | {"error": error}).items()}
        return pareto.Point(name, 1, spread["seconds"], spread["passes"], spread["error"])

    found = [
        point("dear and good", 8.0, 5.0),
        point("cheap", 1.0, 20.0),
        point("as cheap and worse", 1.0, 21.0),
        point("undercut", 4.0, 12.0),
        point("middle", 3.0, 11.0),
        point("no better than middle", 5.0, 11.0),
    ]
    assert [p.method for p in pareto.front(found, price)] == ["cheap", "middle", "dear and good"]


def test_the_radius_is_chosen_by_the_images_held_out_alone():
    rows = [row("SGD", 1, 1.0, unseen=1.0)]
    for rho, errors, unseen in (
        (0.05, (30, 20), 1.0),
        (0.1, (22, 24), 90.0),
        (0.2, (24, 22), 2.0),
        (0.5, (40, 9), 3.0),
    ):
        rows += [row("SAM", 1, error, rho=rho, seed=seed, unseen=unseen) for seed, error in enumerate(errors)]
    assert rho_grid.chosen(rows) == 0.1
    text = rho_grid.section([one | {"config": one["config"] | {"noise_rate": 0.4}} for one in rows])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "**23.00 ± " in lines["0.1"]
    assert "**90.00" in lines["0.1"]
    assert lines["0.1"].endswith("| 6.0 |")  # the paper's, table 8
    assert "**" not in lines["0.2"]
    assert lines["0.5"].endswith("| 40.9 |")


def test_variants_choose_by_the_images_held_out():
    def row(optimizer, held_out, unseen, **options):
        return {
            "config": {"optimizer": optimizer, "options": options, "extra": {}},
            "test_error": held_out,
            "unseen_error": unseen,
        }

    rows = [row("sam", 30, 10, rho=0.1), row("sam", 20, 40, rho=0.1), row("sam", 24, 30, rho=0.2)]
    rows += [row("sam", 24, 31, rho=0.2), row("sam", 1, 1, rho=0.1, ascent_steps=2), row("sam-inf", 3, 3, rho=0.01)]
    groups = variants.norms(rows)
    assert list(groups) == ["p = 2", "p = inf"]
    assert {rho: len(same) for rho, same in groups["p = 2"].items()} == {0.1: 2, 0.2: 2}
    assert variants.chosen(groups["p = 2"]) == 0.2
    assert summary.of(groups["p = 2"][0.2], "unseen_error").mean == 30.5


def test_gap_is_of_test_labels_with_the_noise_of_training():
    labels = torch.arange(40) % 10
    training = SimpleNamespace(
        config=replace(CONFIG, noise_rate=0.25),
        images=SimpleNamespace(test=data.Images(torch.zeros(40, 8, 8, dtype=torch.uint8), labels), classes=10),
        # a model that is always right
        evaluate=lambda images: (100 * float((images.labels != labels).double().mean()), 0.0),
    )
    assert m_sharpness.noisy_test_error(training) == pytest.approx(25)


def test_spearman_and_kendall_are_of_the_runs_given():
    generator = np.random.default_rng(3)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    found = association.spearman(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    assert 0.1 < found.high - found.low < 0.8
    assert association.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert tuple(association.spearman(x, -x)) == pytest.approx((-1, -1, -1))


def test_interval_is_students():
    found = summary.interval([11.0, 12.5, 14.2])
    assert found.mean == pytest.approx(12.5666667)
    # t = 4.302653 for 2 degrees of freedom, s = 1.6010413
    assert found.half == pytest.approx(4.302653 * 1.6010413 / math.sqrt(3), rel=1e-6)
    assert str(summary.interval([3.0])) == "3.00"
    with pytest.raises(ValueError, match="Invalid values="):
        summary.interval([])
