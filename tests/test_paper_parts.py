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

from bench.paper import (
    cost,
    flags,
    m_sharpness,
    methods,
    plan,
    reduction,
    rho_grid,
    spectra,
    summary,
    theorem,
    training,
    variants,
)
from bench.paper import data as paper_data
from bench.paper.config import Config
from bench.training import data

SMALL = flags.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 1, "batch_size": 32}
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
    assert plan.passes(config) == pytest.approx(passes)
    assert plan.passes(replace(config, extra={"alphas": [1, 8]})) == pytest.approx(3 * passes)  # two trials
    forward = passes - 1 if config.options.get("second_order") else passes  # the third pass is backward only
    assert examples == pytest.approx(forward * 96)


@pytest.mark.parametrize("clip", [0.0, 0.4])
@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_weight_decay_in_the_loss_is_in_every_gradient_and_what_is_clipped(optimizer, micro_batch, clip):
    torch.manual_seed(4)
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    old, decay, rho, lr = torch.cat([p.detach().flatten() for p in model.parameters()]), 0.7, 0.3, 0.2

    def gradient(w, part):
        w = w.clone().requires_grad_()
        loss = F.cross_entropy(F.linear(x[part], w[:15].view(3, 5), w[15:]), y[part]) + decay / 2 * (w @ w)
        return torch.autograd.grad(loss, w)[0]

    seconds = []
    for part in [slice(0, 8)] if micro_batch is None else [slice(0, 4), slice(4, 8)]:
        first = gradient(old, part)
        seconds.append(gradient(old + rho * first / first.norm(), part) if optimizer == "sam" else first)
    expected = torch.stack(seconds).mean(dim=0)
    if clip:
        assert expected.norm() > 2 * clip
        expected *= clip / expected.norm()
    values = {"lr": lr, "weight_decay": decay, "nesterov": True, "momentum": 0.6, "batch_size": 8}
    values |= {"optimizer": optimizer, "micro_batch": micro_batch, "clip": clip, "decay_in_loss": True}
    stepper = methods.make(model, replace(CONFIG, **values, options={"rho": rho} if optimizer == "sam" else {}))
    loss, _ = stepper.step(lambda images, labels: F.cross_entropy(model(images), labels), x, y)
    new = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(new, old - lr * 1.6 * expected, rtol=0, atol=5e-6 if clip else 1e-12)
    at_w = F.cross_entropy(F.linear(x, old[:15].view(3, 5), old[15:]), y)
    torch.testing.assert_close(loss, at_w)


def test_cosine_is_that_of_the_whole_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y, rho = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,)), 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = variants.cosine(model, x, y, rho)
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


def test_the_rate_is_halved_after_epochs_in_a_row_without_a_lower_test_loss():
    losses = [3.0, 2.0, 2.5, 2.4, 1.0, 1.0, 1.0 - 5e-5, 1.2, 1.1, 0.9]  # 5e-5 is not lower, for Keras
    factors = [training.plateaus(losses[:count], 2) for count in range(len(losses) + 1)]
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    config = replace(CONFIG, plateau=1, epochs=2)
    run = training.Training(config, paper_data.split(paper_data.load("digits"), config))
    rates = []
    for loss in (0.0, 0.1):  # lower than the run's own
        run.test_losses.append(loss)
        run.advance()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.025]
    assert len(run.test_losses) == 4


# configurations


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"noise_rate": 1.0},
        {"ascent": 0.0},
        {"micro_batch": 33},
        {"micro_batch": 4, "ascent": 0.5},
        {"noise": "pink"},
        {"mixup": -1.0},
        {"clip": -1.0},
        {"plateau": -1},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        replace(CONFIG, **change)


def test_the_key_is_of_the_values_that_are_used():
    assert CONFIG.key == Config(**asdict(CONFIG)).key
    assert len({CONFIG.key, replace(CONFIG, seed=1).key, replace(CONFIG, options={"rho": 0.1}).key}) == 3


@pytest.mark.parametrize(
    ("given", "suffixes"),
    [([], ["-nonorm", "-groupnorm"]), (["--paper"], ["-nonorm"]), (["--norm", "batch", "none"], ["", "-nonorm"])],
)
def test_spectra_are_of_networks_with_and_without_normalisation(given, suffixes):
    own = spectra.EXPERIMENT.defaults
    args = flags.parse(flags.parser("spectra", "", spectra.add_arguments, own), ["--model", "wrn-40-10", *given])
    grid = spectra.grid(args, flags.base_config(args, "cifar10", own))
    assert [(label, config.model) for label, config in grid] == [
        (label, f"wrn-40-10{suffix}") for suffix in suffixes for label in ("SGD", "SAM")
    ]


# choices and statistics


def row(method, epochs, error, *, seconds=1.0, passes=1.0, rho=0.05, noise_rate=0.0, seed=0, unseen=0.0):
    task = replace(CONFIG, epochs=epochs, noise_rate=noise_rate, seed=seed, validation=0.5)
    result = {"test_error": error, "unseen_error": unseen, "seconds": seconds, "passes": passes, "seed": seed}
    about = {"machine": {"cpu": "a", "cores": 2, "isa": "b"}, "versions": {"commit": "c"}, "date": "2026-11-21T10:00"}
    return about | result | {"config": asdict(methods.METHODS[method].configure(task, rho))}


@pytest.mark.parametrize("price", ["seconds", "passes"])
def test_front(price):
    def point(name, paid, error):
        values = {"seconds": 99.0, "passes": 99.0, "error": error} | {price: paid}
        return cost.Point(name, 1, **{key: summary.Interval(value, 0.1, 3) for key, value in values.items()})

    found = [
        point("dear and good", 8.0, 5.0),
        point("cheap", 1.0, 20.0),
        point("as cheap and worse", 1.0, 21.0),
        point("undercut", 4.0, 12.0),
        point("middle", 3.0, 11.0),
        point("no better than middle", 5.0, 11.0),
    ]
    assert [p.method for p in cost.front(found, price)] == ["cheap", "middle", "dear and good"]


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


def test_sam_is_compared_with_as_many_passes_by_seed_and_with_the_chosen_radius():
    rows = []
    for seed, (sgd, sam) in enumerate([(20.0, 15.0), (10.0, 8.0)]):
        rows += [row("SGD", 4, 50.0, seed=seed, unseen=sgd), row("SGD", 2, 50.0, seed=seed, unseen=1.0)]
        rows += [row("SAM", 2, error, rho=rho, seed=seed, unseen=sam) for rho, error in ((0.1, 30.0), (0.2, 40.0))]
    rows.append(row("SAM", 2, 30.0, rho=0.1, seed=7, unseen=1.0))  # without a rival
    del rows[0]["config"]["clip"]  # of before there was such a field
    (found,) = reduction.settings([one | {"kind": "paper", "experiment": "test"} for one in rows])
    assert found.name.endswith("clean labels, 2 epochs, rho 0.1")
    assert (found.saved.mean, found.saved.count) == (pytest.approx(22.5), 2)


def test_the_last_term_of_the_theorem():
    # sqrt((2 ln(1 + 3 / 0.25 (1 + sqrt(ln 100 / 2))^2) + 4 ln(100 / 0.05) + 8 ln(600 + 6)) / 99)
    assert theorem.h(3.0, 0.5, parameters=2, examples=100, delta=0.05) == pytest.approx(0.955306, rel=1e-5)
    measured = {"train_loss": 0.1, "squared_norm": 3.0, "parameters": 2, "examples": 100}
    terms = theorem.bound(measured | {"rises": [{"rho": 0.5, "sharpness": 0.2}]}, 0.5)
    assert terms["bound"] == pytest.approx(0.3 + terms["h"])


def test_gap_is_of_test_labels_with_the_noise_of_training():
    labels = torch.arange(40) % 10
    training = SimpleNamespace(
        config=replace(CONFIG, noise_rate=0.25),
        images=SimpleNamespace(test=data.Images(torch.zeros(40, 8, 8, dtype=torch.uint8), labels), classes=10),
        # a model that is always right
        evaluate=lambda images: (100 * float((images.labels != labels).double().mean()), 0.0),
    )
    assert m_sharpness.noisy_test_error(training) == pytest.approx(25)


def test_interval_is_students():
    found = summary.interval([11.0, 12.5, 14.2])
    assert found.mean == pytest.approx(12.5666667)
    # t = 4.302653 for 2 degrees of freedom, s = 1.6010413
    assert found.half == pytest.approx(4.302653 * 1.6010413 / math.sqrt(3), rel=1e-6)
    assert str(summary.interval([3.0])) == "3.00"
    with pytest.raises(ValueError, match="Invalid values="):
        summary.interval([])
