"""bench.paper.tables: every file is valid and says what the paper says."""

from __future__ import annotations

import pytest

from bench.paper import tables


def mean(name, **wanted):
    found = [row["mean"] for row in tables.published(name) if wanted.items() <= row.items()]
    assert len(found) == 1, (name, wanted)
    return found[0]


@pytest.mark.parametrize("name", tables.RESULTS)
def test_every_table_is_valid_and_says_where_it_is_from(name):
    rows = tables.published(name)
    assert rows
    for row in rows:
        assert row["source"].startswith(("Foret et al. 2021, ", "sayakpaul/Sharpness-Aware-Minimization-TensorFlow, "))
        assert row["metric"]
        assert 0 <= row["mean"] <= (100 if row["unit"] == "%" else float("inf"))
        assert row.get("half") is None or "spread" in row
    labels = [tuple(v for k, v in row.items() if k not in ("mean", "half")) for row in rows]
    assert len(set(labels)) == len(labels)


def test_tables_hold_the_published_values():
    wrn = {"model": "wrn-28-10", "epochs": 1800, "augment": "autoaugment"}
    assert mean("classification", dataset="cifar10", method="SAM", **wrn) == 1.6
    assert mean("classification", dataset="cifar100", method="SGD", **wrn) == 16.1
    assert mean("label_noise", noise_rate=0.4, method="SGD") == 68.8
    assert mean("label_noise", noise_rate=0.4, method="SAM") == 93.4
    assert mean("imagenet", model="resnet-101", epochs=400, method="SGD", metric="test error") == 22.3
    assert mean("finetune", dataset="cifar100", model="efficientnet-l2", method="SAM") == 3.92
    assert mean("svhn_fashion_mnist", dataset="fashion-mnist", model="wrn-28-10", augment="basic", method="SGD") == 4.57
    assert mean("rho_grid", noise_rate=0.8, rho=0.05) == 21.0
    assert mean("inner_steps", dataset="cifar100", ascent_steps=5, metric="estimated sharpness") == 2.82
    assert mean("spectra", epoch=300, method="SGD", metric="lambda_max / lambda_5") == 11.4
    assert mean("keras_report", method="SAM with Adam") == 17.22
    assert mean("default_rho", dataset="cifar100", model="pyramidnet-272-200", augment="basic") == 15.4


@pytest.mark.parametrize(
    ("dataset", "model", "options", "expected"),
    [
        ("cifar10", "wrn-28-10", {}, {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "rho": 0.05, "batch_size": 256}),
        ("cifar100", "wrn-28-10", {"epochs": 1500}, {"epochs": 1800, "lr": 0.05, "weight_decay": 1e-3, "rho": 0.1}),
        ("cifar100", "wrn-28-10", {"epochs": 3}, {"epochs": 200, "lr": 0.1}),
        ("cifar100", "pyramidnet-272-200", {}, {"lr": 0.05, "rho": 0.2, "nesterov": True, "shift": 4}),
        ("cifar10", "pyramidnet-272-200-shakedrop", {}, {"lr": 0.02, "rho": 0.05, "train_size": 50_000}),
        ("fashion-mnist", "shake-shake-26-2x96d", {}, {"rho": 0.02, "train_size": 60_000}),
        ("cifar10", "wrn-40-10", {}, {"epochs": 300}),
        ("cifar10", "resnet-32", {"noise_rate": 0.5}, {"epochs": 200, "rho": 0.1}),
        ("cifar10", "resnet-32", {"noise_rate": 0.75}, {"rho": 0.05}),
        ("svhn", "wrn-28-10", {"epochs": 10}, {"rho": 0.01}),  # no length is published
    ],
)
def test_hyperparameters(dataset, model, options, expected):
    assert expected.items() <= tables.hyperparameters(dataset, model, **options).items()
